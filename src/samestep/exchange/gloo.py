"""The exchange over a process group's collectives.

Each worker sums the gradients of its own micro-batches up to the maximal subtrees of
the canonical tree (`core.tree`); these partials are all-gathered, and every worker
adds them in the order of the tree. The collectives start inside DDP's backward pass,
bucket by bucket, as its communication hook; the sums are taken after it, on the
worker's own thread, since the flush-to-zero mode belongs to a thread and decides bits.

On GPUs, Gloo takes partials through the host's memory, so workers may share a GPU; they
are sent when the last backward pass is over. NCCL moves them from one GPU to the other.

With p workers of k partials each, a worker receives (p - 1) k times the gradient; half
of that if the recipe rounds partials to 16 bits (`samestep.exchange.compression`).
Every worker holds all parameters and updates all of them.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, Store
from torch.futures import Future

from samestep.core.gradient_noise import Watch
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange import Room, Summands
from samestep.exchange.compression import EXACT, Compression
from samestep.exchange.partials import Add, GatheredPartials, PartialSums
from samestep.messages.job import Setup
from samestep.state.flat import Flat


if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""By the device of what is exchanged: metrics are on the CPU, gradients on the GPU."""
HOST = torch.device("cpu")


def join(setup: Setup, topology: Topology, store: Store) -> None:
    """All workers: create the process group."""
    dist.init_process_group(
        BACKENDS[setup.exchange],
        store=store,
        rank=topology.rank,
        world_size=topology.workers,
        timeout=timedelta(seconds=setup.peer_timeout),
    )


class Bucket(Protocol):
    """Gradients that are sent together: DDP's `GradBucket`, or one of a Loop."""

    def index(self) -> int:
        """Return its number."""

    def parameters(self) -> list[Tensor]:
        """Return the parameters."""

    def buffer(self) -> Tensor:
        """Return the memory of all gradients, [n]."""

    def gradients(self) -> list[Tensor]:
        """Return views of it, one for each parameter."""


class GlooExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Range],
        topology: Topology,
        compression: Compression = EXACT,
        carrier: torch.device = HOST,
    ) -> None:
        """Make room for a gradient and for states; `attach` does so for parameters.

        `shares[r]` is the range of micro-batches of worker `r`, without gaps; `carrier`
        is the device between whose memories the process group moves tensors.
        """
        self.workers, self._rank, self._flat = len(shares), topology.rank, flat
        self._num_crossings = topology.nodes if topology.nodes > 1 else 0
        self._compression, self._carrier = compression, carrier
        self._sent_as = compression.sent_as(flat.dtype)
        # Every worker holds and updates the whole vector.
        self.parameters: Tensor
        self.owned, self.is_first = (0, flat.size), self._rank == 0
        self._gradient = torch.zeros(flat.size, device=flat.device, dtype=flat.dtype)
        self.states = list(self._gradient.new_zeros(len(flat.layout.states), flat.size))
        self._position = {id(p): i for i, p in enumerate(flat.parameters)}
        self._views = flat.views(self._gradient)
        self.watch = Watch(shares[-1][1], len(flat.parameters))
        self._ddp: DistributedDataParallel | None = None
        self._group: dist.ProcessGroup | None = None
        """That of the gradients; None: the one of everything."""
        self._memory: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._arrivals: list[Callable[[], None]] = []
        """Functions that finish the all-gathers under way."""
        self._are_written = False
        """Whether the partials of this step come from the caller, not from DDP."""
        self.assign(shares)

    def assign(self, shares: list[Range]) -> None:
        """All workers, between two steps: let them own these micro-batches."""
        self.shares, self._owned = shares, shares[self._rank]
        flat, num_micro_batches = self._flat, shares[-1][1]
        self._gathered = GatheredPartials(shares)
        self._rows = self._gathered.rows
        self._sums = PartialSums(self._owned, num_micro_batches, self._add)
        self._tails = PartialSums(self._owned, num_micro_batches, Tensor.add_)
        self._memory.clear()
        self._own_rows = self._gradient.new_zeros(self._rows, flat.size + flat.tail)
        # DDP's own bucket is sent, without a copy, where nothing has to go beside it.
        self._is_direct = self._rows == 1 and self._compression.is_exact
        gradient = sum(p.numel() for p in flat.parameters)
        row = self._sent_as.itemsize * gradient + flat.dtype.itemsize * flat.tail
        # Gloo gathers around a ring: what is sent passes every edge but one, and
        # as many edges as there are nodes lead from one node to the next.
        passing = (self.workers - 1) * self._rows * row
        self.bytes_per_step = self.workers * passing
        self.network_bytes_per_step = self._num_crossings * passing

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """All workers: take rank 0's parameters; to overlap, wrap the model in DDP.

        What goes through the host does not overlap: a copy waits for the GPU. DDP waits
        for every parameter, and takes none twice. So a model that may skip some, or
        reach one in several backward passes (as reentrant checkpoints of one layer do),
        is exchanged when the last backward pass is over.
        """
        self.parameters = torch.zeros_like(self._gradient)
        self._flat.bind(self.parameters, write=True)
        if not overlap or self._carrier != self._flat.device:
            if self.workers > 1:
                self._take_parameters()
            return objective
        # It imports torch._dynamo, which takes 0.9 s: only where gradients overlap.
        from torch.nn.parallel import DistributedDataParallel

        self._ddp = DistributedDataParallel(
            objective, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        self._ddp.register_comm_hook(self, _launch)
        return self._ddp

    def _take_parameters(self) -> None:
        """All workers: take rank 0's parameters."""
        values = self.parameters.to(self._carrier)
        dist.broadcast(values, src=0)
        self.parameters.copy_(values)

    def accumulate(self, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of a forward and backward pass.

        In that of the last own micro-batch DDP calls the hook, which sends.
        """
        if micro_batch == self._owned[0]:
            self._clear()
        is_last = self.workers > 1 and micro_batch == self._owned[1] - 1
        if self._ddp is None or is_last:
            return nullcontext()
        return self._ddp.no_sync()

    def _clear(self) -> None:
        """Forget the sums of a step that is over, or was given up."""
        self._sums.values.clear()
        self._tails.values.clear()
        self._arrivals.clear()
        self._are_written = False

    def place(self, parameter: Tensor) -> None:
        """Return None: gradients are left in `grad`."""

    def after_backward(self, micro_batch: int) -> None:
        """Take the gradients of a micro-batch up the tree."""
        if self._flat.tail:
            self._tails.push(micro_batch, self._flat.read_tail())
        if self._arrivals:  # the hook has sent those of the last one
            return
        gradients = self._flat.gradients()
        if self.watch.active:
            self.watch.note(micro_batch, gradients)
        for parameter in self._flat.parameters:
            parameter.grad = None
        self._sums.push(micro_batch, self._compress(gradients))

    def partials(self) -> list[Tensor]:
        """Return vectors for this worker's partials, [size + tail] each."""
        flat = self._flat
        rows = self._own_rows[: len(self._gathered.subtrees[self._rank])]
        self._sums.values = [flat.views(row) for row in rows]
        self._tails.values = [row[flat.size :] for row in rows] if flat.tail else []
        self._are_written = True
        return list(rows)

    def _compress(self, gradients: list[Tensor]) -> list[Tensor]:
        for gradient in gradients:
            self._compression(gradient)
        return gradients

    def _add(self, left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        torch._foreach_add_(left, right)
        return self._compress(left)

    def room(self, num_bytes: int) -> Room | None:
        """Return None: workers send messages, and have no memory in common."""
        return None

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: sum the gradients [size] and the tails [tail]."""
        tail = self._gradient.new_empty(self._flat.tail)
        if self.workers == 1:
            torch._foreach_copy_(self._views, self._sums.values[0])
            if self._flat.tail:
                (tail,) = self._tails.values
        else:
            self._gather_rest(tail)
            for arrive in self._arrivals:
                arrive()
            for parameter in self._flat.parameters:
                parameter.grad = None  # a view of DDP's bucket
        self._clear()
        self._compression.check(self._gradient)
        return self._gradient, tail

    def whole_sum(self) -> tuple[list[Tensor], Tensor]:
        """All workers: do as `sum`; return the gradient of each parameter.

        They are the caller's.
        """
        if self.workers > 1:
            _, tail = self.sum()
            gradients = self._views
            self._gradient = torch.empty_like(self._gradient)
            self._views = self._flat.views(self._gradient)
            return gradients, tail
        (gradients,), (tail,) = self._sums.values, self._tails.values
        self._clear()
        # Row by row, as they are with others: the bits of a norm follow the layout.
        return [gradient.contiguous() for gradient in gradients], tail

    def summands(self) -> tuple[Summands, Tensor]:
        """All workers: return the sum, as the only summand, and that of the tails."""
        total, tail = self.sum()
        return Summands([total], [0]), tail

    def _gather_rest(self, tail: Tensor) -> None:
        """All workers: send what has not been sent during the backward pass."""
        if self._are_written or (self._ddp is None and not self._arrivals):
            size = sum(p.numel() for p in self._flat.parameters)
            buffers = self._buffers(0, self._rows, size, self._sent_as)
            self._gather(self._views, self._sums.values, buffers, self._compression.add)
        elif self._owned[0] == self._owned[1] and self._ddp is not None:
            # Without micro-batches: a pass over no samples calls the hook, too.
            loss, _ = self._ddp(torch.empty(0), torch.empty(0, dtype=torch.int64))
            loss.backward()
        if len(tail):
            buffers = self._buffers(-1, self._rows, len(tail), self._flat.dtype)
            partials = [[partial] for partial in self._tails.values]
            self._gather([tail], partials, buffers, Tensor.add_)

    def _arrive(
        self,
        works: Sequence[dist.Work],
        received: Tensor,
        targets: Sequence[Tensor],
        add: Add,
    ) -> None:
        """Wait for partials [workers * rows, n]; write their sums to the targets."""
        for work in works:
            work.wait()
        # On this thread: flushing denormal numbers to zero is a mode of a thread.
        partials = received.to(self._flat.device, self._flat.dtype)
        total = self._gathered.add_up(partials, add)
        parts = torch.split(total, [target.numel() for target in targets])
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.view_as(target))

    def all_gather_parameters(self) -> None:
        """Do nothing: every worker has updated its own copy."""

    def merge(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from the one worker that has it."""
        if self.workers > 1:
            dist.all_reduce(values)
        return values

    def merge_slices(self, values: Tensor) -> Tensor:
        """Return the values: every worker has filled all cells."""
        return values

    def send_bucket(self, bucket: Bucket) -> None:
        """Send the own partials of a bucket of gradients of the last micro-batch.

        The stack of sums stays as it is: each bucket takes other parameters of it.
        """
        index = [self._position[id(p)] for p in bucket.parameters()]
        targets = [self._views[i] for i in index]
        before: list[list[Tensor]] = []
        if self._owned[0] < self._owned[1]:
            before = self._complete(bucket, index)
        buffer = bucket.buffer()
        sent, received = self._memory_of(bucket)
        if self._is_direct:
            sent = buffer.view(1, -1)
        else:
            sent[len(before)].copy_(buffer)
        self._gather(targets, before, (sent, received), self._compression.add)

    def _memory_of(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """Return memory to send from, unless that is the bucket's, and to receive."""
        rows = 0 if self._is_direct else self._rows
        return self._buffers(
            bucket.index(), rows, bucket.buffer().numel(), self._sent_as
        )

    def _complete(self, bucket: Bucket, index: list[int]) -> list[list[Tensor]]:
        """Add to the bucket the sums that its gradients complete; return the others."""
        last, micro_batch = bucket.gradients(), self._owned[1] - 1
        if self.watch.active:
            self.watch.note(micro_batch, last, index)
        self._compression(bucket.buffer())
        before, completed = self._sums.before(micro_batch)
        for left in reversed(completed):
            torch._foreach_add_(last, [left[i] for i in index])
            self._compression(bucket.buffer())
        return [[partial[i] for i in index] for partial in before]

    def _gather(
        self,
        targets: Sequence[Tensor],
        partials: list[list[Tensor]],
        buffers: tuple[Tensor, Tensor],
        add: Add,
    ) -> None:
        """All workers: begin to gather partials, each one tensor for each target."""
        sent, received = buffers
        for row, partial in zip(sent, partials, strict=False):
            places = torch.split(row, [tensor.numel() for tensor in partial])
            torch._foreach_copy_(places, [tensor.reshape(-1) for tensor in partial])
        works = self._all_gather(received, sent)
        arrive = functools.partial(self._arrive, works, received, targets, add)
        self._arrivals.append(arrive)

    def _all_gather(self, received: Tensor, sent: Tensor) -> list[dist.Work]:
        """All workers: begin to gather what each sends; return what to wait for."""
        return [
            dist.all_gather_single(
                received.view(-1), sent.view(-1), self._group, async_op=True
            )
        ]

    def _buffers(
        self, number: int, rows: int, size: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return [rows, size] to send and [workers * rows, size] to receive, reused."""
        key = number, rows, size
        if key not in self._memory:
            sent = torch.zeros(rows, size, dtype=dtype, device=self._carrier)
            received = sent.new_empty(self.workers * self._rows, size)
            self._memory[key] = sent, received
        return self._memory[key]


# DDP compares these annotations with its own types.
def _launch(state: GlooExchange, bucket: GradBucket) -> Future[Tensor]:
    state.send_bucket(bucket)
    buffer = bucket.buffer()
    done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
    done.set_result(buffer)
    return done
