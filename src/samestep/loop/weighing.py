"""What the losses of a step are over, in a loop of one's own: samples, or targets."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samestep.core.tree_sum import tree_sum
from samestep.errors import OwnCodeError
from samestep.loop.process_group import Group


class Weights:
    """The counts of this worker's micro-batches, until all workers compare them."""

    def __init__(self, group: Group, micro_batches: int) -> None:
        self._group = group
        self._counts = torch.zeros(micro_batches, dtype=torch.float64)
        self._weighed: set[int] = set()
        self._at: int | None = None
        """The micro-batch at hand."""

    def begin(self) -> None:
        """A step."""
        self._counts.zero_()
        self._weighed.clear()

    @contextmanager
    def of(self, micro_batch: int) -> Iterator[None]:
        """Inside, a count is that of this micro-batch."""
        self._at = micro_batch
        try:
            yield
        finally:
            self._at = None

    def set(self, count: float) -> None:
        """Of the micro-batch at hand. Raises OwnCodeError."""
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
        """What a loss is over: the count that was set, or the samples."""
        is_weighed = micro_batch in self._weighed
        return self._counts[micro_batch].item() if is_weighed else samples

    def total(self, weighed: int, micro_batches: int) -> float | None:
        """All workers: of the whole global batch; None if no micro-batch is weighed.

        From how many of the `micro_batches` with samples are `weighed`, of all workers.
        Raises OwnCodeError, alike on all of them.
        """
        if weighed == 0:
            return None
        if weighed < micro_batches:
            raise OwnCodeError(
                "Of a step, all micro-batches are weighed or none; "
                f"{weighed} of {micro_batches} were. Call `weigh` in each."
            )
        return tree_sum(self._group.merge(self._counts.clone())).item()
