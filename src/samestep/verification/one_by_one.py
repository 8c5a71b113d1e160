"""Micro-batches computed one by one, for hashes of their own gradients.

With `--ledger micro-batches` an audit can say in which micro-batch a step went wrong,
and which worker computed it. What computes several together, or lets the update compute
gradients of matrices, never has the gradient of a single one in one place; so here each
is computed alone, hashed, and added up the canonical tree. The bits are the same.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from samestep.core import tree
from samestep.core.ownership import Share
from samestep.core.tree import Range
from samestep.exchange import Exchange
from samestep.exchange.autograd import Instruments
from samestep.exchange.compression import Compression
from samestep.state.flat import Flat
from samestep.state.hashing import hash_of


class Passes(Protocol):
    """What computes micro-batches: by torch, or with portable arithmetic."""

    def run(self, step: int, owned: Share, instruments: Instruments) -> None:
        """Compute this worker's micro-batches of a step, counted from 0."""

    def write(
        self,
        step: int,
        owned: Share,
        partials: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Compute any micro-batches of a step; write their partials."""


class OneByOne:
    """Computes micro-batches by other passes, one after the other."""

    def __init__(
        self, passes: Passes, flat: Flat, exchange: Exchange, compression: str
    ) -> None:
        """Make room for the vectors that wait to be added up the tree."""
        self._passes, self._exchange, self._size = passes, exchange, flat.size
        self._micro_batches = exchange.shares[-1][1]
        self._compression = Compression.of(compression)
        depth = (self._micro_batches - 1).bit_length()
        rows = flat.saved_buffers().new_zeros(depth, flat.size + flat.tail)
        self._rows = list(rows)

    def run(self, step: int, owned: Share, instruments: Instruments) -> None:
        """Compute this worker's micro-batches of a step, counted from 0."""
        self.write(step, owned, self._exchange.partials(), instruments)

    def write(
        self,
        step: int,
        owned: Share,
        partials: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Compute any micro-batches of a step; write their partials."""
        subtrees = tree.subtrees(owned, self._micro_batches)
        for node, partial in zip(subtrees, partials, strict=True):
            self._sum(step, node, partial, self._rows, instruments)

    def _sum(
        self,
        step: int,
        node: Range,
        out: Tensor,
        rows: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Write the sum over a node of the tree; `rows` are free for others below."""
        if node[1] - node[0] == 1:
            self._passes.write(step, node, [out], instruments)
            # The sign of a zero follows how torch computes a product, and is lost in
            # sums: adding zero removes it.
            gradient = (out[: self._size] + 0.0).cpu().numpy()
            instruments.record_hash(node[0], hash_of(gradient))
        else:
            middle, (right, *free) = tree.split(node), rows
            self._sum(step, (node[0], middle), out, free, instruments)
            self._sum(step, (middle, node[1]), right, free, instruments)
            self._compression(out.add_(right)[: self._size])
        instruments.lap("backward")


def passes_for(
    ledger: str, passes: Passes, flat: Flat, exchange: Exchange, compression: str
) -> Passes:
    """Return what computes the micro-batches of a training with this ledger."""
    if ledger == "steps":
        return passes
    return OneByOne(passes, flat, exchange, compression)
