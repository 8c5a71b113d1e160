"""Which samples of a step belong to which micro-batches."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samestep.core import tree
from samestep.core.ownership import shares
from samestep.core.plan import Plan
from samestep.core.tree import Range
from samestep.portable import inputs


@dataclass(frozen=True)
class Piece:
    """A range of micro-batches of one step, which a call computes."""

    starts: list[int]
    """Where each begins among the call's samples, and where the last ends."""
    kernel_starts: Tensor
    """The same, for the kernels."""
    merges: Tensor
    """How many sums of the tree each completes."""
    first: int
    """The first sample, counted from the first of the step."""


class Pieces:
    """Which samples belong to which micro-batches; cached, since steps repeat."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._epoch = plan, -1
        self._order: inputs.Numbers = np.empty(0, np.int64)
        self._pieces: dict[tuple[Range, int], Piece] = {}

    def piece(self, step: int, node: Range) -> Piece:
        """Return a range of the micro-batches of a step."""
        size = self._plan.batch_size(step)
        if (node, size) not in self._pieces:
            num = self._plan.micro_batches
            parts = shares(size, num)[slice(*node)]
            first = parts[0][0]
            starts = [start - first for start, _ in parts] + [parts[-1][1] - first]
            merges = [tree.num_merges(m, node, num) for m in range(*node)]
            self._pieces[node, size] = Piece(
                starts, torch.tensor(starts), torch.tensor(merges), first
            )
        return self._pieces[node, size]

    def samples(self, step: int, piece: Piece) -> inputs.Numbers:
        """Return the training samples of a piece, int64 [n]."""
        epoch, _ = self._plan.place(step)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan.order(epoch).numpy()
        first = self._plan.bounds(step)[0] + piece.first
        return self._order[first : first + piece.starts[-1]]
