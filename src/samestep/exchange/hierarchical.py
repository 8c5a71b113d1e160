"""The exchange of several machines: shared memory within each, messages between them.

Every node holds all parameters and the optimizer's whole state, once for its workers
(`shared.py`). Its workers own a contiguous range of micro-batches together; the sums of
the maximal subtrees of the canonical tree inside that range are its rows. "Node" is a
machine here; a node of the tree is called a subtree. In every step:

    1. barrier within the node: all partials of its workers are there
    2. every worker sums them over its slice, up to the rows of the node
    3. barrier: the rows are there
    4. the vector is cut into one piece for each node. The leader sends to each other
       node the rows of that one's piece, adds up all rows of its own piece in the
       order of the tree, and sends the sum to all others
    5. barrier: the gradient is there; every worker updates its slice

To the memory of `shared.py` each node adds, after it:

    rows [most rows, size]   written in 2, each slice by its worker; sent in 4
    total [size], tails [tail]   written in 4 by the leader, received or added up
                                 by it; read by all workers after 5

N nodes of one row each send 2 (N - 1) vectors in all, as many as a ring all-reduce:
that is so where each owns a subtree, as where all own the same power of two of
micro-batches. Nodes of k rows send (k + 1) (N - 1). With `compression` in the recipe
all these are of 16 bits. BatchNorm's buffers are never rounded; every leader gets all
rows of them.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from samestep.core import tree
from samestep.core.ownership import pieces
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange import Room, Summands
from samestep.exchange.compression import EXACT, Compression
from samestep.exchange.internode import Leaders, Message, Wait
from samestep.exchange.shared import Pieces, SharedExchange, vectors_read
from samestep.state.flat import Flat
from samestep.state.layout import ALIGNMENT
from samestep.system.shared_memory import pages


@dataclass(frozen=True)
class ExchangePlan:
    """Which node sends what: an ownership of micro-batches, seen from the nodes."""

    owned: list[list[Range]]
    """The micro-batches of each worker of each node."""
    rows: list[list[Range]]
    """For each node, the maximal subtrees in what its workers own together."""
    pieces: list[Range]
    """The part of the vector that each node adds up."""

    @classmethod
    def of(cls, shares: list[Range], sizes: list[int], length: int) -> "ExchangePlan":
        """Plan for a vector of `length` elements; `sizes` are each node's workers."""
        ends = pairwise(accumulate(sizes, initial=0))
        owned = [shares[first:end] for first, end in ends]
        spans = [(local[0][0], local[-1][1]) for local in owned]
        rows = [tree.subtrees(span, shares[-1][1]) for span in spans]
        # Whole cache lines: the last node's piece ends where the parameters do, and
        # padding after it is not sent: in `total` it stays zero.
        cuts = [ALIGNMENT * cut for cut in pieces(length // ALIGNMENT, len(sizes))]
        return cls(owned, rows, list(pairwise(cuts)))

    def sent(self, node: int) -> int:
        """Return how many elements a node sends in a step: its rows, then sums."""
        first, end = self.pieces[node]
        own, others = end - first, len(self.pieces) - 1
        return len(self.rows[node]) * (self.pieces[-1][1] - own) + others * own


class NodesExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Range],
        topology: Topology,
        within: SharedExchange,
        memory: int,
        store: Store,
        timeout_seconds: float,
    ) -> None:
        """All workers: wait, as long as the `store` does, until all leaders are here.

        Makes room for the node's rows in the `memory` of its exchange `within`.
        `shares[r]` is the range of micro-batches of worker `r`, without gaps.
        """
        self.workers, self._node = topology.workers, topology.node
        self._within, self._compression = within, within.compression
        if topology.is_leader:
            store.set(f"workers/{topology.node}", str(topology.local_workers))
        self._sizes = [int(store.get(f"workers/{n}")) for n in range(topology.nodes)]
        self._leaders: Leaders | None = None
        if topology.is_leader:
            self._leaders = Leaders(store, self._node, self._sizes, timeout_seconds)
        self.parameters, self.owned = within.parameters, within.owned
        self.states, self.watch = within.states, within.watch
        self.is_first = self._node == 0
        # Each node has all parameters and all slices: these stay within it.
        self.attach, self.accumulate = within.attach, within.accumulate
        self.after_backward, self.partials = within.after_backward, within.partials
        self.merge_slices = within.merge_slices
        self.all_gather_parameters = within.all_gather_parameters
        self._size, self._tail, self._dtype = flat.size, flat.tail, flat.dtype
        self._sent_as = self._compression.sent_as(flat.dtype)
        self._length = flat.layout.offsets[-1]

        most, sent_as = tree.deepest_stack(shares[-1][1]), self._sent_as
        shared = Pieces(
            memory,
            within.num_bytes,
            pages(sent_as.itemsize * most * flat.size)
            + pages(sent_as.itemsize * flat.size)
            + pages(flat.dtype.itemsize * flat.tail),
        )
        self._rows = shared.take(most, flat.size, dtype=sent_as)
        self._total = shared.take(flat.size, dtype=sent_as)
        self._tails = shared.take(flat.tail, dtype=flat.dtype)
        self._sum = torch.empty(self.owned[1] - self.owned[0], dtype=flat.dtype)
        self._adding, self._spreading = within.patience(), within.patience()
        self.assign(shares)

    def assign(self, shares: list[Range]) -> None:
        """All workers, between two steps: let them own these micro-batches."""
        self._within.assign(shares)
        self.shares = shares
        sizes, self._num_micro_batches = self._sizes, shares[-1][1]
        self._plan = ExchangePlan.of(shares, sizes, self._length)
        rows, item = self._plan.rows, self._dtype.itemsize
        width = self._sent_as.itemsize
        num_rows = sum(map(len, rows))
        sent = sum(self._plan.sent(node) for node in range(len(sizes)))
        tails = item * self._tail * (len(sizes) - 1) * num_rows
        self.network_bytes_per_step = width * sent + tails
        # Within a node: as on one machine, and the rows and the sum by the others.
        read = sum(
            item * vectors_read(local, self._num_micro_batches)
            + width * (len(subtrees) + 1) * (len(local) - 1) / len(local)
            for local, subtrees in zip(self._plan.owned, rows, strict=True)
        )
        self.bytes_per_step = self.network_bytes_per_step + round(self._size * read)

    def room(self, num_bytes: int) -> Room | None:
        """Return None: machines have no memory in common."""
        return None

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: sum the gradients over the own slice, and the tails [tail]."""
        self._within.gather()
        part, subtrees = slice(*self.owned), self._plan.rows[self._node]
        for row, subtree in zip(self._rows, subtrees, strict=False):
            row[part] = self._within.value(subtree, part, self._compression)
        self._within.barrier.wait(self._adding)
        if self._leaders is not None:
            self._add_up(self._leaders, subtrees)
        self._within.barrier.wait(self._spreading)
        self._sum.copy_(self._total[part])
        self._compression.check(self._sum)
        return self._sum, self._tails

    def summands(self) -> tuple[Summands, Tensor]:
        """All workers: return the sum, as the only summand, and that of the tails."""
        total, tail = self.sum()
        return Summands([total], [0]), tail

    def _add_up(self, leaders: Leaders, subtrees: list[Range]) -> None:
        """All leaders: sum the rows of all nodes into the memory of this one.

        What is to come is announced before anything is sent: an announcement would
        have to wait behind what is on its way, and the link would stand still.
        """
        tails = torch.empty(len(subtrees), self._tail, dtype=self._dtype)
        for row, subtree in zip(tails, subtrees, strict=True):
            tail = slice(self._size, self._size + self._tail)
            row.copy_(self._within.value(subtree, tail, EXACT))
        # Every node adds up all of the tails: they are short, and need no second round.
        everything = [(0, self._tail)] * len(self._sizes)
        swaps = (self._rows, self._plan.pieces), (tails, everything)
        rows_arriving, tails_arriving = [self._expect(leaders, *swap) for swap in swaps]
        total = [self._total[slice(*piece)] for piece in self._plan.pieces]
        own = total[self._node]
        waits = [leaders.receive([(other, total[other]) for other in leaders.others])]
        for values, parts in swaps:
            mine = values[: len(subtrees)]
            pairs = [(o, mine[:, slice(*parts[o])]) for o in leaders.others]
            waits.append(leaders.send([(o, row) for o, rows in pairs for row in rows]))
        own.copy_(self._reduced(rows_arriving, self._compression))
        waits.append(leaders.send([(other, own) for other in leaders.others]))
        self._tails.copy_(self._reduced(tails_arriving, EXACT))
        for wait in waits:
            wait()

    def _expect(
        self, leaders: Leaders, rows: Tensor, pieces: list[Range]
    ) -> tuple[Wait, dict[Range, Tensor]]:
        """All leaders: receive the own piece of all nodes' rows.

        Returns what waits for them, and where each subtree's sum will then be.
        """
        first, end = pieces[self._node]
        own = self._plan.rows[self._node]
        # Copies: sums are written into them, perhaps before the tails have left for a
        # node that owns nothing, from which nothing is to arrive.
        parts = dict(zip(own, rows[: len(own), first:end].clone(), strict=True))
        messages = list[Message]()
        for other in leaders.others:
            theirs = self._plan.rows[other]
            room = rows.new_empty(len(theirs), end - first)
            parts |= zip(theirs, room, strict=True)
            messages += [(other, row) for row in room]
        return leaders.receive(messages), parts

    def _reduced(
        self, arriving: tuple[Wait, dict[Range, Tensor]], compression: Compression
    ) -> Tensor:
        """Wait for the sums of subtrees [n] and return that of the whole tree, [n]."""
        arrive, parts = arriving
        arrive()
        values = {subtree: value.to(self._dtype) for subtree, value in parts.items()}
        return tree.reduce(self._num_micro_batches, values, compression.add)

    def merge(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from the one worker that has it."""
        self._within.merge(values)
        if self._leaders is None:
            values.zero_()  # all workers of the node hold its cells now: only one adds
        else:
            self._leaders.merge(values)
        return self._within.merge(values)
