"""The exchange through the shared memory of one machine, or of each of several.

All workers of a machine map one memory object. It holds the parameters and the
optimizer's state, once for all workers, and each worker's partial gradients of its own
micro-batches:

    parameters [size]   states [k, size]   partials [workers, slots, size + tail]

    1. a worker's backward passes write its partials, summed up the canonical tree
    2. barrier: all partials are there
    3. every worker sums all partials over its own slice of the vector, in the order of
       the tree, and updates its slice of the parameters
    4. barrier: all slices are updated; the next forward pass reads them

The object has no name (memfd): it vanishes with its last process, however that ends,
and the size of /dev/shm does not limit it. Linux only, since other systems lack memfd
or process-shared semaphores; elsewhere `auto` chooses gloo and says so. `nodes.py` has
what several machines do between 2 and 4.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from samestep.core import tree
from samestep.core.gradient_noise import Watch
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange.compression import EXACT, Compression
from samestep.models.layers import Linear
from samestep.state.flat import Flat, dense
from samestep.system import barrier, shared_memory
from samestep.system.shared_memory import pages


SCRATCH = 8192
"""float64 cells for each worker, for `merge`."""


class Pieces:
    """The shared object, given out in pieces that start at page boundaries."""

    def __init__(self, fd: int, header_bytes: int, num_bytes: int) -> None:
        """Makes the object large enough. Raises PlacementError if memory is short."""
        self._used = pages(header_bytes)
        self.map = shared_memory.reserve(
            fd,
            self._used + num_bytes,
            "The exchange `shared`",
            "Use fewer workers or a smaller model, or `--exchange gloo`; the result is "
            "the same.",
        )
        self._bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """The next piece; zeros in the beginning."""
        size = torch.Size(shape).numel() * dtype.itemsize
        piece = self._bytes[self._used : self._used + size]
        self._used += pages(size)
        return piece.view(dtype).view(shape)


class SharedExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Range],
        topology: Topology,
        fd: int,
        spin_seconds: float,
        timeout_seconds: float,
        compression: Compression = EXACT,
        start_seconds: float = 0.0,
    ) -> None:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps.

        The first waits may take `start_seconds`, see `Barrier`. The memory `fd` is that
        of the workers of this node.
        """
        self.workers, self._here, self._flat = len(shares), topology, flat
        self._num_leaves, self.compression = shares[-1][1], compression
        rank, local_workers = topology.local_rank, topology.local_workers
        slots = tree.deepest_stack(self._num_leaves)
        # Slots start at pages: the alignment of a product may decide its bits.
        dtype, item = flat.dtype, flat.dtype.itemsize
        width = pages(item * (flat.size + flat.tail)) // item
        num_states = len(flat.layout.states)
        shared = Pieces(
            fd,
            barrier.header_bytes(local_workers),
            pages(item * flat.size)
            + pages(item * num_states * flat.size)
            + pages(item * local_workers * slots * width)
            + pages(8 * local_workers * SCRATCH),
        )
        # First, so that workers find it even if their models are not alike.
        self._scratch = shared.take(local_workers, SCRATCH, dtype=torch.float64)
        self.parameters = shared.take(flat.size, dtype=dtype)
        states = shared.take(num_states, flat.size, dtype=dtype)
        self._slots_of = shared.take(local_workers, slots, width, dtype=dtype)
        self.num_bytes = len(shared.map)

        self.owned = flat.layout.slices(local_workers)[rank]
        self.states = [state[slice(*self.owned)] for state in states]
        self.assign(shares)
        self._sum = torch.empty(self.owned[1] - self.owned[0], dtype=dtype)
        self._slots = list(self._slots_of[rank])
        self._views = [flat.views(slot) for slot in self._slots]
        self._position = {id(p): i for i, p in enumerate(flat.parameters)}
        self.watch = Watch(self._num_leaves, len(flat.parameters))
        self.network_bytes_per_step = 0
        self._depth, self._merging = 0, False
        self._missing: set[int] = set()
        waits = timeout_seconds, topology.local_ranks[0], start_seconds
        self.barrier = barrier.Barrier(shared.map, rank, local_workers, *waits)
        self._spin_seconds = spin_seconds
        self._summing, self._publishing, self._noting = (
            self.patience() for _ in range(3)
        )

    def assign(self, shares: list[Range]) -> None:
        """All workers, between two steps: who owns which micro-batches."""
        own, local = shares[self._here.rank], shares[slice(*self._here.local_ranks)]
        self._merges = {
            leaf: tree.num_merges(leaf, own, self._num_leaves) for leaf in range(*own)
        }
        self._partials = {
            node: self._slots_of[worker, slot]
            for worker, owned in enumerate(local)
            for slot, node in enumerate(tree.subtrees(owned, self._num_leaves))
        }
        vectors = vectors_read(local, self._num_leaves)
        vector = self._flat.dtype.itemsize * self._flat.size
        self.bytes_per_step = round(vector * vectors)

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """All workers: the parameters become views of the leader's, shared."""
        self._flat.bind(self.parameters, write=self._here.is_leader)
        self.barrier.wait(self._publishing)
        for module in objective.modules():
            if isinstance(module, Linear):
                module.sink = self._place
        return objective

    def accumulate(self, leaf: int) -> AbstractContextManager[None]:
        """The context of a forward and backward pass."""
        self._missing = set(self._position.values())
        self._merging = self._merges[leaf] > 0
        if not self._merging:
            self._depth += 1
        return nullcontext()

    def _place(self, parameter: Tensor) -> Tensor | None:
        """Where a gradient is to be written, unless it is to be added to another."""
        position = self._position[id(parameter)]
        if self._merging or position not in self._missing:
            return None
        self._missing.remove(position)
        return self._views[self._depth - 1][position]

    def after_backward(self, leaf: int) -> None:
        """After the backward pass of `leaf`: completes the sums that end with it."""
        if self.watch.active and self._merging:
            self.watch.note(leaf, self._flat.gradients())
        for own, parameter in zip(
            self._views[self._depth - 1], self._flat.parameters, strict=True
        ):
            if parameter.grad is not None:  # it was not written to its place
                gradient = dense(parameter.grad)
                self._take(own, gradient, self._position[id(parameter)])
                parameter.grad = None
            elif self._merging:  # zeros are added, as elsewhere: -0.0 becomes 0.0
                own.add_(0.0)
        if not self._merging:
            for position in self._missing:  # without a gradient in this pass
                self._views[self._depth - 1][position].zero_()
            if self.watch.active:
                self.watch.note(leaf, self._views[self._depth - 1])
        self._take_buffers(self._slots[self._depth - 1])
        self._round(self._slots[self._depth - 1])
        for _ in range(self._merges[leaf] - 1):
            self._depth -= 1
            self._slots[self._depth - 1].add_(self._slots[self._depth])
            self._round(self._slots[self._depth - 1])

    def _round(self, slot: Tensor) -> None:
        """The gradient in it; not the buffers."""
        self.compression(slot[: self._flat.size])

    def _take(self, own: Tensor, gradient: Tensor, position: int) -> None:
        if self._merging:
            own.add_(self.compression(gradient))
        elif position not in self._missing:
            own.add_(gradient)
        else:
            own.copy_(gradient)
            self._missing.remove(position)

    def _take_buffers(self, slot: Tensor) -> None:
        if self._flat.tail:
            tail = slice(self._flat.size, self._flat.size + self._flat.tail)
            own, buffers = slot[tail], self._flat.read_buffers()
            own.add_(buffers) if self._merging else own.copy_(buffers)

    def patience(self) -> barrier.Patience:
        """For one more place in a step at which the workers wait for each other."""
        return barrier.Patience(self._spin_seconds)

    def gather(self) -> None:
        """All workers of the node: from now on, the partials of all are there."""
        self._depth = 0
        self.barrier.wait(self._summing)

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: the gradient over the own slice, and the sum of the tails."""
        self.gather()
        total = self._total(slice(*self.owned), self._sum, self.compression)
        self.compression.check(total)
        return total, self._tails()

    def _tails(self) -> Tensor:
        size, tail = self._flat.size, self._flat.tail
        if tail == 0:
            return torch.empty(0)
        out = torch.empty(tail, dtype=self._flat.dtype)
        return self._total(slice(size, size + tail), out, EXACT)

    def _total(self, part: slice, out: Tensor, compression: Compression) -> Tensor:
        root = (0, self._num_leaves)
        if root in self._partials:
            return self._partials[root][part]
        middle = tree.split(root)
        left, right = (
            self.value(node, part, compression)
            for node in ((0, middle), (middle, root[1]))
        )
        return compression(torch.add(left, right, out=out))

    def value(self, node: Range, part: slice, compression: Compression) -> Tensor:
        """Of a node of the tree that the workers of this machine own, after `gather`.

        Reads only: the partials belong to their workers.
        """
        if node in self._partials:
            return self._partials[node][part]
        middle = tree.split(node)
        left = self.value((node[0], middle), part, compression)
        return compression(left + self.value((middle, node[1]), part, compression))

    def all_gather_parameters(self) -> None:
        """All workers: after the update; everyone's slice is then up to date."""
        self.barrier.wait(self._publishing)

    def merge(self, values: Tensor) -> Tensor:
        """All workers: float64 cells that only one worker has filled, from each."""
        for cells in torch.split(values.view(-1), SCRATCH):
            self._scratch[self._here.local_rank, : len(cells)] = cells
            self.barrier.wait(self._noting)
            torch.sum(self._scratch[:, : len(cells)], dim=0, out=cells)
            self.barrier.wait(self._noting)
        return values

    def merge_slices(self, values: Tensor) -> Tensor:
        """All workers: cells of which each has filled those of its slice."""
        return self.merge(values) if self._here.local_workers > 1 else values


def vectors_read(owned: list[Range], num_leaves: int) -> float:
    """How many vectors' worth the workers of a machine read of each other's memory.

    Each reads its slice of the others' partials, and all parameters but its slice.
    """
    others = len(owned) - 1
    partials = sum(len(tree.subtrees(share, num_leaves)) for share in owned)
    return others / len(owned) * partials + others
