"""The number of targets that a loss is over, in a user's own loop."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samestep.core.tree import tree_sum
from samestep.errors import OwnCodeError
from samestep.exchange import Merger


class Weights:
    """The counts of this worker's micro-batches, until all workers add them up."""

    def __init__(self, micro_batches: int) -> None:
        self._counts = torch.zeros(micro_batches, dtype=torch.float64)
        self._weighed: set[int] = set()
        self._at: int | None = None
        """The current micro-batch."""

    def begin(self) -> None:
        """Forget the counts of the last step."""
        self._counts.zero_()
        self._weighed.clear()

    @contextmanager
    def of(self, micro_batch: int) -> Iterator[None]:
        """Take counts inside for those of this micro-batch."""
        self._at = micro_batch
        try:
            yield
        finally:
            self._at = None

    def set(self, count: float) -> None:
        """Set the count of the current micro-batch. Raises OwnCodeError."""
        if self._at is None or self._at in self._weighed:
            raise OwnCodeError(
                "`weigh` says how many targets the loss of one micro-batch is over: "
                "call it once for each, in the loop over the micro-batches of a step."
            )
        if not 0 <= count < math.inf:
            raise OwnCodeError(
                "A loss is over a number of targets, or the sum of their weights, and "
                f"neither is negative; `weigh` received {count}."
            )
        self._counts[self._at] = count
        self._weighed.add(self._at)

    def __contains__(self, micro_batch: int) -> bool:
        return micro_batch in self._weighed

    def count(self, micro_batch: int, samples: int) -> float:
        """Return what a loss is over: the count that was set, or the samples."""
        is_weighed = micro_batch in self._weighed
        return self._counts[micro_batch].item() if is_weighed else samples

    def total(self, exchange: Merger, weighed: int, micro_batches: int) -> float | None:
        """All workers: return the count of the global batch; None if none was set.

        `weighed` of the `micro_batches` with samples have one, of all workers. Raises
        OwnCodeError, on all of them, if only some have.
        """
        if weighed == 0:
            return None
        if weighed < micro_batches:
            raise OwnCodeError(
                "In a step all micro-batches are weighed, or none; "
                f"{weighed} of {micro_batches} were. Call `weigh` in each."
            )
        return tree_sum(exchange.merge(self._counts.clone())).item()
