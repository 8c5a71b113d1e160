"""The sums of a worker's own micro-batches, and of all workers', by the tree.

A worker adds up what its own micro-batches give as far as the canonical tree
(`core.tree`) allows: to the maximal subtrees that it owns. These partials go to the
other workers, and each adds them all up in the order of the tree.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

from samestep.core import tree
from samestep.core.tree import Range


T = TypeVar("T")
Add = Callable[[Tensor, Tensor], Tensor]


class PartialSums(Generic[T]):
    """One worker's sums while it computes its micro-batches, in their order.

    They are a stack: each micro-batch pushes its value, then the two on top are added
    as often as it completes a sum. After the last one, what is left are the partials.
    """

    def __init__(
        self, owned: Range, micro_batches: int, add: Callable[[T, T], T]
    ) -> None:
        """Begin without values; `add(left, right)` may write into `left`."""
        self._add = add
        self.merges = {
            m: tree.num_merges(m, owned, micro_batches) for m in range(*owned)
        }
        """How many sums each own micro-batch completes."""
        self.values: list[T] = []

    def push(self, micro_batch: int, value: T) -> None:
        """Add the value of the next own micro-batch, which belongs to this from now."""
        self.values.append(value)
        self.merge(self.merges[micro_batch])

    def merge(self, times: int) -> None:
        """Replace the two values on top by their sum, a number of `times`."""
        for _ in range(times):
            right = self.values.pop()
            self.values[-1] = self._add(self.values[-1], right)

    def before(self, micro_batch: int) -> tuple[list[T], list[T]]:
        """Return the sums that are complete before the next own micro-batch, and those
        that it completes, in the order of the micro-batches."""
        complete = len(self.values) - self.merges[micro_batch]
        return self.values[:complete], self.values[complete:]


class GatheredPartials:
    """Where the partials of all workers lie after an all-gather: [workers * rows, n].

    Every worker sends the same number of rows, as collectives need it; a worker of
    fewer partials leaves its last rows as they are, and they are not read.
    """

    def __init__(self, shares: list[Range]) -> None:
        """Lay out the rows.

        `shares[r]` is the range of micro-batches of worker `r`, without gaps.
        """
        self._micro_batches = shares[-1][1]
        self.subtrees = [tree.subtrees(owned, self._micro_batches) for owned in shares]
        """The partials of each worker."""
        self.rows = max(map(len, self.subtrees))
        """The most partials of any worker."""
        self._row_of = {
            node: worker * self.rows + row
            for worker, nodes in enumerate(self.subtrees)
            for row, node in enumerate(nodes)
        }

    def add_up(self, received: Tensor, add: Add) -> Tensor:
        """Return the sum of all rows in the order of the tree, [n], one of the rows."""
        rows = {node: received[row] for node, row in self._row_of.items()}
        return tree.reduce(self._micro_batches, rows, add)
