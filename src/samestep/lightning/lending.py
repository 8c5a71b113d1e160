"""A micro-batch for processes that have none of a small global batch.

They compute one of another process, and add nothing to any sum: so they do what
`training_step` does besides, such as clearing gradients.
"""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from samestep.core.ownership import lengths, shares
from samestep.loop.loop import Loop


class Lending:
    """Sends the first micro-batch with samples to the processes that have none."""

    def __init__(self, loop: Loop, size: int, micro_batches: int) -> None:
        """All processes: find who has samples of a global batch of this size."""
        sizes = lengths(shares(size, micro_batches))
        owned = shares(micro_batches, loop.workers)
        counts = [sum(sizes[first:end]) for first, end in owned]
        self._lender = next(rank for rank, count in enumerate(counts) if count)
        self._is_needed = 0 in counts

    def lend(self, piece: Any) -> None:
        """All processes with samples: send the first micro-batch, as it was fetched."""
        if self._is_needed:
            others = random.getstate(), np.random.get_state(legacy=False)
            self._send([piece, torch.get_rng_state(), *others])

    def borrow(self) -> Any:
        """All processes without samples: return it, and set the generators for it."""
        piece, state, python, numpy = self._send([None] * 4)
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
        return piece

    def _send(self, values: list[Any]) -> list[Any]:
        dist.broadcast_object_list(values, src=self._lender)
        self._is_needed = False
        return values
