"""Values of micro-batches, one tensor each, summed over a process group by the tree.

A worker sums what its own micro-batches give up to the maximal subtrees that it owns
(`core.tree`); these partials are all-gathered, and every worker adds them in the
order of the tree.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from samestep.core import tree
from samestep.core.tree import Range


CPU = torch.device("cpu")
Add = Callable[[Tensor, Tensor], Tensor]


class Partials:
    """One sum at a time; all workers take part."""

    def __init__(
        self, shares: list[Range], rank: int, device: torch.device = CPU
    ) -> None:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps."""
        self._workers, self._leaves = len(shares), shares[-1][1]
        self.merges = {
            leaf: tree.num_merges(leaf, shares[rank], self._leaves)
            for leaf in range(*shares[rank])
        }
        """How many sums are complete after each own micro-batch."""
        contributed = [tree.subtrees(owned, self._leaves) for owned in shares]
        self.rows = max(map(len, contributed))
        """The most partials that any worker contributes: what each one sends."""
        self._nodes = {
            node: worker * self.rows + row
            for worker, nodes in enumerate(contributed)
            for row, node in enumerate(nodes)
        }
        self._stack: list[Tensor] = []
        self._device = device

    def clear(self) -> None:
        """Forgets what was pushed for a sum that nobody has taken."""
        self._stack.clear()

    def push(self, leaf: int, value: Tensor) -> None:
        """What the next own micro-batch gives: [n], which belongs to this from now."""
        self._stack.append(value)
        for _ in range(self.merges[leaf]):
            right = self._stack.pop()
            self._stack[-1] += right

    def total(self, size: int, dtype: torch.dtype) -> Tensor:
        """All workers: the sum of what all of them pushed, [size], of this type."""
        stack, self._stack = self._stack, []
        if self._workers == 1:
            return stack[0]
        sent = torch.zeros(self.rows, size, device=self._device, dtype=dtype)
        for row, partial in enumerate(stack):
            sent[row] = partial
        received = sent.new_empty(self._workers * self.rows, size)
        dist.all_gather_single(received.view(-1), sent.view(-1))
        return self.add_up(received)

    def add_up(self, received: Tensor, add: Add = Tensor.add_) -> Tensor:
        """[workers * rows, n] -> [n], which may be one of the rows."""
        rows = {node: received[row] for node, row in self._nodes.items()}
        return tree.reduce(self._leaves, rows, add)
