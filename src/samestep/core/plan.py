"""Which samples make up each optimizer step: a pure function of the recipe.

An epoch is one permutation of the samples, cut into global batches; a global batch is
cut into `M` contiguous micro-batches. Nothing here knows how many workers there are.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.core import splitmix
from samestep.core.ownership import lengths, shares


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed for one purpose, independent of those for all others.

    A hash, since seeds that differ by little may give generators correlated streams.
    """
    text = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Plan:
    """The sample order of a whole training."""

    num_samples: int
    global_batch: int
    micro_batches: int
    seed: int
    is_portable: bool = False
    """Whether the order is that of portable arithmetic, which needs no torch."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last may have fewer samples."""
        return -(-self.num_samples // self.global_batch)

    def order(self, epoch: int) -> Tensor:
        """Draw the permutation of an epoch, counted from 0: int64 [num_samples]."""
        seed = derive_seed(self.seed, "order", epoch)
        if self.is_portable:
            return torch.from_numpy(splitmix.permutation(seed, self.num_samples))
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_samples, generator=generator)

    def batch_size(self, step_in_epoch: int) -> int:
        """Return the number of samples of a global batch."""
        left = self.num_samples - step_in_epoch * self.global_batch
        return min(left, self.global_batch)

    def micro_batch_sizes(self, step_in_epoch: int) -> list[int]:
        """Return the number of samples of each micro-batch; at most one apart."""
        return lengths(shares(self.batch_size(step_in_epoch), self.micro_batches))

    def num_pieces(self, step_in_epoch: int) -> int:
        """Return how many micro-batches have samples."""
        return min(self.batch_size(step_in_epoch), self.micro_batches)

    def micro_batch(self, order: Tensor, step_in_epoch: int, index: int) -> Tensor:
        """Return the samples of a micro-batch, int64 [b]; 0 in a short global batch."""
        size, start = self.batch_size(step_in_epoch), step_in_epoch * self.global_batch
        first, end = shares(size, self.micro_batches)[index]
        return order[start + first : start + end]
