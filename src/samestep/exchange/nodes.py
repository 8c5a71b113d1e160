"""The exchange of several machines: shared memory within each, messages between them.

Every node holds all parameters and the optimizer's whole state, once for its workers
(`shared.py`). Its workers own a contiguous range of micro-batches together; the maximal
subtrees of the canonical tree inside that range are its rows. In every step:

    1. barrier within the node: all partials of its workers are there
    2. every worker sums them over its slice, up to the rows of the node
    3. barrier: the rows are there
    4. the vector is cut into one piece for each node. The leader sends to each other
       node the rows of that one's piece, adds up all rows of its own piece in the
       order of the tree, and sends the sum to all others
    5. barrier: the gradient is there; every worker updates its slice

N nodes of one row each send 2 (N - 1) vectors in all, as many as a ring all-reduce:
that is so where each node owns a subtree. Nodes of k rows send (k + 1) (N - 1). With
`compression` in the recipe all these are of 16 bits. BatchNorm's buffers stay float32;
every leader gets all rows of them.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import Store

from samestep import tree
from samestep.balance import pieces
from samestep.exchange.leaders import Leaders
from samestep.exchange.shared import Pieces, SharedExchange, vectors_read
from samestep.flat import Flat
from samestep.layout import ALIGNMENT
from samestep.memory import pages
from samestep.place import Place
from samestep.rounding import EXACT, Rounding
from samestep.tree import Node


@dataclass(frozen=True)
class Division:
    """Who sends what: an ownership of micro-batches, seen from the nodes."""

    owned: list[list[Node]]
    """The micro-batches of each worker of each node."""
    rows: list[list[Node]]
    """Of each node: the maximal nodes of the tree in what its workers own together."""
    pieces: list[Node]
    """The part of the vector that each node adds up."""

    @classmethod
    def of(cls, shares: list[Node], sizes: list[int], length: int) -> "Division":
        """Of a vector of `length` elements; `sizes` are the workers of each node."""
        ends = pairwise(accumulate(sizes, initial=0))
        owned = [shares[first:end] for first, end in ends]
        spans = [(local[0][0], local[-1][1]) for local in owned]
        rows = [tree.subtrees(span, shares[-1][1]) for span in spans]
        cuts = [ALIGNMENT * cut for cut in pieces(length // ALIGNMENT, len(sizes))]
        return cls(owned, rows, list(pairwise(cuts)))

    def sent(self, node: int) -> int:
        """Elements of the vector that a node sends in a step: its rows, then sums."""
        first, end = self.pieces[node]
        own, others = end - first, len(self.pieces) - 1
        return len(self.rows[node]) * (self.pieces[-1][1] - own) + others * own


@dataclass(frozen=True)
class Nodes:
    """All machines."""

    sizes: list[int]
    """How many workers each of them has."""
    leaders: Leaders | None
    """Only the first worker of a node has a connection to the other nodes."""

    @classmethod
    def meet(cls, place: Place, store: Store, timeout_seconds: float) -> "Nodes":
        """All workers: waits, as long as the store does, until all leaders are here."""
        if place.is_leader:
            store.set(f"workers/{place.node}", str(place.local_workers))
        sizes = [int(store.get(f"workers/{node}")) for node in range(place.nodes)]
        if not place.is_leader:
            return cls(sizes, None)
        return cls(sizes, Leaders(store, place.node, sizes, timeout_seconds))


class NodesExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Node],
        place: Place,
        within: SharedExchange,
        memory: int,
        nodes: Nodes,
    ) -> None:
        """`within` is the exchange of this node, in the same `memory`.

        `shares[r]` is the range of micro-batches of worker `r`, without gaps.
        """
        self.workers, self._node = place.workers, place.node
        self._within, self._nodes, self._rounding = within, nodes, within.rounding
        self.parameters, self.owned = within.parameters, within.owned
        self.states, self.watch = within.states, within.watch
        self._size, self._tail = flat.size, flat.tail
        self._length = flat.layout.offsets[-1]

        most, dtype = tree.deepest_stack(shares[-1][1]), self._rounding.dtype
        shared = Pieces(
            memory,
            within.num_bytes,
            pages(dtype.itemsize * most * flat.size)
            + pages(dtype.itemsize * flat.size)
            + pages(4 * flat.tail),
        )
        self._rows = shared.take(most, flat.size, dtype=dtype)
        self._total = shared.take(flat.size, dtype=dtype)
        self._tails = shared.take(flat.tail)
        self._sum = torch.empty(self.owned[1] - self.owned[0])
        self._adding, self._spreading = within.patience(), within.patience()
        self.assign(shares)

    def assign(self, shares: list[Node]) -> None:
        """All workers, between two steps: who owns which micro-batches."""
        self._within.assign(shares)
        sizes, self._num_leaves = self._nodes.sizes, shares[-1][1]
        self._division = Division.of(shares, sizes, self._length)
        rows, width = self._division.rows, self._rounding.dtype.itemsize
        num_rows = sum(map(len, rows))
        first, end = self._division.pieces[self._node]
        others = num_rows - len(rows[self._node])
        self._room = torch.empty(others, end - first, dtype=self._rounding.dtype)
        sent = sum(self._division.sent(node) for node in range(len(sizes)))
        tails = 4 * self._tail * (len(sizes) - 1) * num_rows
        self.network_bytes_per_step = width * sent + tails
        # Within a node: as on one machine, and the rows and the sum by the others.
        read = sum(
            4 * vectors_read(local, self._num_leaves)
            + width * (len(nodes) + 1) * (len(local) - 1) / len(local)
            for local, nodes in zip(self._division.owned, rows, strict=True)
        )
        self.bytes_per_step = self.network_bytes_per_step + round(self._size * read)

    def attach(self, objective: nn.Module) -> nn.Module:
        """All workers: the parameters become views of those of the node's leader."""
        return self._within.attach(objective)

    def turn(self, leaf: int) -> AbstractContextManager[None]:
        """The context of a forward and backward pass."""
        return self._within.turn(leaf)

    def collect(self, leaf: int) -> None:
        """After the backward pass of `leaf`: completes the sums that end with it."""
        self._within.collect(leaf)

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: the gradient over the own slice, and the sum of the tails."""
        self._within.gather()
        part, nodes = slice(*self.owned), self._division.rows[self._node]
        for row, node in zip(self._rows, nodes, strict=False):
            row[part] = self._within.value(node, part, self._rounding)
        self._within.barrier.wait(self._adding)
        if self._nodes.leaders is not None:
            self._add_up(self._nodes.leaders, nodes)
        self._within.barrier.wait(self._spreading)
        self._sum.copy_(self._total[part])
        self._rounding.check(self._sum)
        return self._sum, self._tails

    def _add_up(self, leaders: Leaders, nodes: list[Node]) -> None:
        """All leaders: the rows of all nodes, into the memory of this one."""
        others, own = leaders.others, slice(*self._division.pieces[self._node])
        pieces = {other: slice(*self._division.pieces[other]) for other in others}
        origins = [
            (other, node) for other in others for node in self._division.rows[other]
        ]
        rows, room = self._rows[: len(nodes)], self._room
        tail = slice(self._size, self._size + self._tail)
        tails = [self._within.value(node, tail, EXACT).clone() for node in nodes]
        tail_room = torch.empty(len(origins), self._tail)
        leaders.swap(
            [(other, row) for other in others for row in rows[:, pieces[other]]]
            + [(other, row) for other in others for row in tails],
            [(other, row) for (other, _), row in zip(origins, room, strict=True)]
            + [
                (other, row) for (other, _), row in zip(origins, tail_room, strict=True)
            ],
        )
        order = [*nodes, *(node for _, node in origins)]
        parts = dict(zip(order, [*rows[:, own], *room], strict=True))
        self._total[own] = self._reduced(parts, self._rounding)
        if self._tail:
            parts = dict(zip(order, [*tails, *tail_room], strict=True))
            self._tails.copy_(self._reduced(parts, EXACT))
        leaders.swap(
            [(other, self._total[own]) for other in others],
            [(other, self._total[pieces[other]]) for other in others],
        )

    def _reduced(self, parts: dict[Node, Tensor], rounding: Rounding) -> Tensor:
        """Nodes of the tree [n] -> its root, float32 [n]."""
        values = {node: value.float() for node, value in parts.items()}
        return tree.reduce(self._num_leaves, values, rounding.add)

    def publish(self) -> None:
        """All workers: after the update; everyone's slice is then up to date."""
        self._within.publish()

    def merge(self, values: Tensor) -> Tensor:
        """All workers: float64 cells that only one worker has filled, from each."""
        self._within.merge(values)
        if self._nodes.leaders is None:
            values.zero_()
        else:
            self._nodes.leaders.merge(values)
        return self._within.merge(values)

    def merge_slices(self, values: Tensor) -> Tensor:
        """All workers: cells of which each has filled those of its slice."""
        return self._within.merge_slices(values)
