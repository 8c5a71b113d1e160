"""Exact training with Transformers: a subclass of its Trainer, docs/transformers.md.

The extra `transformers` installs what it needs.
"""

from samestep.transformers.trainer import SamestepTrainer


__all__ = ["SamestepTrainer"]
