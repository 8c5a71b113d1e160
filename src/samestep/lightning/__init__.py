"""Exact training with Lightning: a strategy for its Trainer, docs/lightning.md.

The extra `lightning` installs what it needs.
"""

from samestep.lightning.strategy import SamestepStrategy


__all__ = ["SamestepStrategy"]
