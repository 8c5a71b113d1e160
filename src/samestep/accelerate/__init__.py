"""Exact training with Hugging Face Accelerate: docs/accelerate.md.

The extra `accelerate` installs what it needs.
"""

from samestep.accelerate.accelerator import Accelerator


__all__ = ["Accelerator"]
