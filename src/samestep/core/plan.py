"""Which samples make up each optimizer step: a pure function of the recipe.

An epoch is one permutation of the samples, cut into global batches; a global batch is
cut into `M` contiguous micro-batches. Nothing here knows how many workers there are.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from samestep.core.ownership import pieces


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of the seeds for all others."""
    text = "/".join(map(str, (seed, *purpose))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class Plan:
    """The sample order of a whole training."""

    num_samples: int
    global_batch: int
    micro_batches: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer samples; none is dropped."""
        return -(-self.num_samples // self.global_batch)

    def order(self, epoch: int) -> Tensor:
        """int64 [num_samples]: the permutation of one epoch, counted from 0."""
        generator = torch.Generator().manual_seed(
            derive_seed(self.seed, "order", epoch)
        )
        return torch.randperm(self.num_samples, generator=generator)

    def batch_size(self, step_in_epoch: int) -> int:
        """The number of samples of one global batch."""
        left = self.num_samples - step_in_epoch * self.global_batch
        return min(left, self.global_batch)

    def micro_batch_sizes(self, step_in_epoch: int) -> list[int]:
        """Samples of each micro-batch; they differ by at most one."""
        cuts = pieces(self.batch_size(step_in_epoch), self.micro_batches)
        return [end - first for first, end in pairwise(cuts)]

    def num_pieces(self, step_in_epoch: int) -> int:
        """Micro-batches that have samples."""
        return min(self.batch_size(step_in_epoch), self.micro_batches)

    def micro_batch(self, order: Tensor, step_in_epoch: int, index: int) -> Tensor:
        """int64 [b]: the samples of one micro-batch; `b` may be 0 in a short batch."""
        size = self.batch_size(step_in_epoch)
        start = step_in_epoch * self.global_batch
        cuts = pieces(size, self.micro_batches)
        return order[start + cuts[index] : start + cuts[index + 1]]
