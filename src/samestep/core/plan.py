"""Which samples make up each optimizer step: a pure function of the recipe.

An epoch is one permutation of the samples, cut into global batches; a global batch is
cut into `M` contiguous micro-batches. Nothing here knows how many workers there are.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.core import splitmix
from samestep.core.ownership import Share, lengths, shares


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
        """Optimizer steps per epoch; the last may have fewer samples.

        0 if it is not known, and so is then the number of samples.
        """
        return -(-self.num_samples // self.global_batch)

    def order(self, epoch: int) -> Tensor:
        """Draw the permutation of an epoch, counted from 0: int64 [num_samples]."""
        seed = derive_seed(self.seed, "order", epoch)
        if self.is_portable:
            return torch.from_numpy(splitmix.permutation(seed, self.num_samples))
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.num_samples, generator=generator)

    def place(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and its number in the epoch.

        All count from 0, steps over all epochs.
        """
        return divmod(step, self.steps_per_epoch)

    def begins_epoch(self, step: int) -> bool:
        """Return whether a step is the first of its epoch."""
        return self.place(step)[1] == 0

    def digest(self, step: int) -> str:
        """Return what must be equal in all workers from a step on; empty: it is."""
        return ""

    def bounds(self, step: int) -> Share:
        """Return where a global batch begins and ends in the order of its epoch."""
        first = self.place(step)[1] * self.global_batch
        return first, min(first + self.global_batch, self.num_samples)

    def batch_size(self, step: int) -> int:
        """Return the number of samples of a global batch."""
        first, end = self.bounds(step)
        return end - first

    def micro_batch_sizes(self, step: int) -> list[int]:
        """Return the number of samples of each micro-batch; at most one apart."""
        return lengths(shares(self.batch_size(step), self.micro_batches))

    def num_pieces(self, step: int) -> int:
        """Return how many micro-batches have samples."""
        return min(self.batch_size(step), self.micro_batches)

    def micro_batch(self, order: Tensor, step: int, index: int) -> Tensor:
        """Return the samples of a micro-batch, int64 [b]; 0 in a short global batch.

        `order` is that of the step's epoch.
        """
        start, end = self.bounds(step)
        first, last = shares(end - start, self.micro_batches)[index]
        return order[start + first : start + last]
