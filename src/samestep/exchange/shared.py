"""The exchange through the shared memory of one machine, or of each of several.

All workers of a machine map one memory object. It holds the parameters and the
optimizer's state, once for all workers, and each worker's partial gradients of its own
micro-batches:

    scratch [2, workers, cells]   parameters [size]   states [k, size]
    partials [workers, slots, size + tail]

    1. a worker's backward passes write its partials, summed up the canonical tree
    2. barrier: all partials are there
    3. every worker sums all partials over its own slice of the vector, in the order of
       the tree, and updates its slice of the parameters
    4. barrier: all slices are updated; the next forward pass reads them

Nothing is locked, since between two barriers each element is written by one worker
only: in 1 a worker's slots by itself, in 3 each slice of the vectors by its owner.
Barrier 4 also keeps a slot from being overwritten while another worker still reads it.

The object has no name (memfd): it vanishes with its last process, however that ends,
and the size of /dev/shm does not limit it. Linux only, since other systems lack memfd
or process-shared semaphores; elsewhere `auto` chooses gloo and says so. What several
machines do between 2 and 4 is in `hierarchical.py`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from samestep.core import tree
from samestep.core.gradient_noise import Watch
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange import Room, Summands
from samestep.exchange.compression import EXACT, Compression
from samestep.exchange.partials import PartialSums
from samestep.state.flat import Flat, dense
from samestep.system import shared_memory
from samestep.system.barrier import Barrier, Patience, Waits, header_bytes
from samestep.system.shared_memory import pages


SCRATCH = 8192
"""float64 cells for each worker, for `merge`."""


@runtime_checkable
class WritesGradients(Protocol):
    """A layer whose backward pass can write its gradients to where they are summed."""

    gradient_sink: Callable[[nn.Parameter], Tensor | None] | None
    """Returns that place, or None to have the gradient in `grad` as usual."""


class Pieces:
    """The shared object, given out in pieces that start at page boundaries."""

    def __init__(self, fd: int, header_bytes: int, num_bytes: int) -> None:
        """Make the object large enough. Raises PlacementError if memory is short."""
        self._used = pages(header_bytes)
        self.map = shared_memory.reserve(
            fd,
            self._used + num_bytes,
            "The exchange `shared`",
            "Use fewer workers or a smaller model, or the exchange `gloo`; the result "
            "is the same.",
        )
        self._bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return the next piece; it is zero at first."""
        size = torch.Size(shape).numel() * dtype.itemsize
        piece = self._bytes[self._used : self._used + size]
        self._used += pages(size)
        return piece.view(dtype).view(shape)


@dataclass(frozen=True)
class _Slot:
    """Room for one partial."""

    vector: Tensor
    """[size + tail + padding]: a gradient, then what it takes along."""
    views: list[Tensor]
    """The gradient of each parameter."""


class SharedExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Range],
        topology: Topology,
        fd: int,
        waits: Waits,
        compression: Compression = EXACT,
    ) -> None:
        """Make room in the memory `fd`, which the workers of this node share.

        `shares[r]` is the range of micro-batches of worker `r`, without gaps.
        """
        self.workers, self._topology, self._flat = len(shares), topology, flat
        self._num_micro_batches, self.compression = shares[-1][1], compression
        rank, local_workers = topology.local_rank, topology.local_workers
        num_slots = tree.deepest_stack(self._num_micro_batches)
        # Slots start at pages: the alignment of a product may decide its bits.
        dtype, item = flat.dtype, flat.dtype.itemsize
        width = pages(item * (flat.size + flat.tail)) // item
        num_states = len(flat.layout.states)
        shared = Pieces(
            fd,
            header_bytes(local_workers),
            pages(item * flat.size)
            + pages(item * num_states * flat.size)
            + pages(item * local_workers * num_slots * width)
            + pages(8 * 2 * local_workers * SCRATCH),
        )
        # First, so that workers find it even if their models are not alike.
        self._scratch = shared.take(2, local_workers, SCRATCH, dtype=torch.float64)
        self.parameters = shared.take(flat.size, dtype=dtype)
        states = shared.take(num_states, flat.size, dtype=dtype)
        self._all_slots = shared.take(local_workers, num_slots, width, dtype=dtype)
        self.num_bytes, self._fd = len(shared.map), fd
        self._no_tail = torch.empty(0, dtype=dtype)

        self.owned = flat.layout.slices(local_workers)[rank]
        self.is_first = True  # among the workers of this node
        self.states = [state[slice(*self.owned)] for state in states]
        self._own_slots = [_Slot(v, flat.views(v)) for v in self._all_slots[rank]]
        self.assign(shares)
        self._position = {id(p): i for i, p in enumerate(flat.parameters)}
        self.watch = Watch(self._num_micro_batches, len(flat.parameters))
        self.network_bytes_per_step = 0
        self._merging, self._half = False, 0
        self._missing: set[int] = set()
        first = topology.local_ranks[0]
        self.barrier = Barrier(shared.map, rank, local_workers, waits, first)
        # Each place in a step learns for itself how long a wait there takes.
        self._spin_seconds = waits.spin_seconds
        self._summing, self._publishing, self._noting = (
            self.patience() for _ in range(3)
        )

    def assign(self, shares: list[Range]) -> None:
        """All workers, between two steps: let them own these micro-batches."""
        self.shares = shares
        topology, micro_batches = self._topology, self._num_micro_batches
        own, local = shares[topology.rank], shares[slice(*topology.local_ranks)]
        self._first, self._sums = own[0], PartialSums(own, micro_batches, self._add)
        self._num_partials = len(tree.subtrees(own, micro_batches))
        self._partials = {
            node: self._all_slots[worker, slot]
            for worker, owned in enumerate(local)
            for slot, node in enumerate(tree.subtrees(owned, micro_batches))
        }
        leaves = [v[slice(*self.owned)] for v in self._partials.values()]
        # Made once: when the caches are full of numbers, each slice takes microseconds.
        self._summands = Summands(leaves, self._order())
        vectors = vectors_read(local, micro_batches)
        vector = self._flat.dtype.itemsize * self._flat.size
        self.bytes_per_step = round(vector * vectors)

    def _order(self) -> list[int]:
        """Return the postfix order in which partials of this machine are added."""
        number = {node: n for n, node in enumerate(self._partials)}

        def postfix(node: Range) -> list[int]:
            if node in number or node[1] - node[0] < 2:
                return [number[node]] if node in number else []
            middle = tree.split(node)
            return [*postfix((node[0], middle)), *postfix((middle, node[1])), -1]

        return postfix((0, self._num_micro_batches))

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """All workers: make the parameters views of the leader's, which are shared."""
        self._flat.bind(self.parameters, write=self._topology.is_leader)
        self.barrier.wait(self._publishing)
        for module in objective.modules():
            if isinstance(module, WritesGradients):
                module.gradient_sink = self.place
        return objective

    def accumulate(self, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of a forward and backward pass.

        A pass that completes a sum of two micro-batches adds its gradients to the slot
        on top; any other writes them into the next slot.
        """
        if micro_batch == self._first:  # after a step that is over, or was given up
            self._sums.values.clear()
            # Others may read the slots until then, after a whole sum.
            self.barrier.finish(self._publishing)
        self._missing = set(self._position.values())
        self._merging = self._sums.merges[micro_batch] > 0
        if not self._merging:
            self._sums.values.append(self._own_slots[len(self._sums.values)])
        return nullcontext()

    def place(self, parameter: Tensor) -> Tensor | None:
        """Return where to write its gradient of this pass, None if that is to be added.

        Then it is left in `grad`.
        """
        position = self._position[id(parameter)]
        if self._merging or position not in self._missing:
            return None
        self._missing.remove(position)
        return self._sums.values[-1].views[position]

    def after_backward(self, micro_batch: int) -> None:
        """Take the gradients of a micro-batch up the tree."""
        if self.watch.active and self._merging:
            self.watch.note(micro_batch, self._flat.gradients())
        slot = self._sums.values[-1]
        for own, parameter in zip(slot.views, self._flat.parameters, strict=True):
            if parameter.grad is not None:  # it was not written to its place
                gradient = dense(parameter.grad)
                self._take(own, gradient, self._position[id(parameter)])
                parameter.grad = None
            elif self._merging:  # zeros are added, as elsewhere: -0.0 becomes 0.0
                own.add_(0.0)
        if not self._merging:
            for position in self._missing:  # without a gradient in this pass
                slot.views[position].zero_()
            if self.watch.active:
                self.watch.note(micro_batch, slot.views)
        self._take_tail(slot)
        self._compress(slot)
        if self._merging:  # its first sum is complete
            self._sums.merge(self._sums.merges[micro_batch] - 1)

    def partials(self) -> list[Tensor]:
        """Return the slots of this worker's partials, [size + tail] each."""
        size = self._flat.size + self._flat.tail
        return [slot.vector[:size] for slot in self._own_slots[: self._num_partials]]

    def room(self, num_bytes: int) -> Room | None:
        """All workers: enlarge the shared memory by `num_bytes` for each of them."""
        width = pages(num_bytes)
        shared = Pieces(self._fd, self.num_bytes, self.workers * width)
        pieces = shared.take(self.workers, width, dtype=torch.uint8)
        self.num_bytes = len(shared.map)
        return Room(pieces, self._topology.rank)

    def _add(self, left: _Slot, right: _Slot) -> _Slot:
        left.vector.add_(right.vector)
        return self._compress(left)

    def _compress(self, slot: _Slot) -> _Slot:
        """Round the gradient in it; not the tail."""
        self.compression(slot.vector[: self._flat.size])
        return slot

    def _take(self, own: Tensor, gradient: Tensor, position: int) -> None:
        if self._merging:
            own.add_(self.compression(gradient))
        elif position not in self._missing:
            own.add_(gradient)
        else:
            own.copy_(gradient)
            self._missing.remove(position)

    def _take_tail(self, slot: _Slot) -> None:
        if self._flat.tail:
            own = slot.vector[self._flat.size : self._flat.size + self._flat.tail]
            tail = self._flat.read_tail()
            own.add_(tail) if self._merging else own.copy_(tail)

    def patience(self) -> Patience:
        """Return that of one more place in a step at which workers wait."""
        return Patience(self._spin_seconds)

    def gather(self) -> None:
        """All workers of the node: wait until the partials of all are there."""
        self.barrier.wait(self._summing)

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: sum the gradients over the own slice, and the tails [tail]."""
        return self._sum()

    def _sum(self, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.gather()
        root = 0, self._num_micro_batches
        total = self.value(root, slice(*self.owned), self.compression, out)
        self.compression.check(total)
        return total, self._tail()

    def whole_sum(self) -> tuple[list[Tensor], Tensor]:
        """All workers: do as `sum`, but return the whole gradient of each parameter.

        They are the caller's. For a model that is not attached. Two partials are added
        by each worker for itself, whole. Of more, each sums its slice into the vector
        for the parameters, and copies the others'.
        """
        if len(self._partials) == 2:
            self.gather()
            vector = slice(0, self._flat.size)
            root = 0, self._num_micro_batches
            total, tail = self.value(root, vector, self.compression), self._tail()
            # Its slots are written to again in the next step.
            self.barrier.arrive(self._publishing)
        else:
            _, tail = self._sum(self.parameters[slice(*self.owned)])
            self.all_gather_parameters()
            total = self.parameters.clone()
        return self._flat.views(total), tail

    def summands(self) -> tuple[Summands, Tensor]:
        """All workers: return the partials over the own slice, and the tail's sum."""
        self.gather()
        return self._summands, self._tail()

    def _tail(self) -> Tensor:
        """Return the sum of the tails of all micro-batches, [tail], after `gather`."""
        if not self._flat.tail:
            return self._no_tail
        size = self._flat.size
        part = slice(size, size + self._flat.tail)
        return self.value((0, self._num_micro_batches), part, EXACT)

    def value(
        self,
        node: Range,
        part: slice,
        compression: Compression,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return part of the sum that belongs to a node of the tree, after `gather`.

        The workers of this machine own all of that node. Partials are only read, since
        all workers read them now. With `out` the sum is written there.
        """
        if node in self._partials:
            partial = self._partials[node][part]
            return partial if out is None else out.copy_(partial)
        middle = tree.split(node)
        left = self.value((node[0], middle), part, compression)
        right = self.value((middle, node[1]), part, compression)
        return compression(torch.add(left, right, out=out))

    def all_gather_parameters(self) -> None:
        """All workers, after the update: wait until every slice is up to date."""
        self.barrier.wait(self._publishing)

    def merge(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from the one worker that has it."""
        for cells in torch.split(values.view(-1), SCRATCH):
            # In turns: who writes to one half has met all others since they read it.
            self._half = 1 - self._half
            scratch = self._scratch[self._half, :, : len(cells)]
            scratch[self._topology.local_rank] = cells
            self.barrier.wait(self._noting)
            torch.sum(scratch, dim=0, out=cells)
        return values

    def merge_slices(self, values: Tensor) -> Tensor:
        """All workers: fill cells, each from those that update its slice."""
        return self.merge(values) if self._topology.local_workers > 1 else values


def vectors_read(owned: list[Range], num_micro_batches: int) -> float:
    """Return how many vectors the workers of a machine read of each other's memory.

    Each reads its slice of the others' partials, and all parameters but its slice.
    """
    others = len(owned) - 1
    partials = sum(len(tree.subtrees(share, num_micro_batches)) for share in owned)
    return others / len(owned) * partials + others
