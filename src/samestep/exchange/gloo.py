"""The exchange over a process group's collectives.

Each worker sums the gradients of its own micro-batches up to the maximal subtrees of
the canonical tree (`core.tree`); these partials are all-gathered, and every worker
adds them in the order of the tree. The collectives start inside DDP's backward pass,
bucket by bucket, as its communication hook; the sums are taken after it, on the
worker's own thread, since the flush-to-zero mode belongs to a thread and decides bits.

With p workers of k partials each, a worker receives (p - 1) k times the gradient; half
of that if the recipe rounds partials to 16 bits (`samestep.exchange.compression`).
Every worker holds all parameters and updates all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, Store
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from samestep.core.gradient_noise import Watch
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange.compression import EXACT, Compression
from samestep.exchange.tree_gather import Partials
from samestep.state.flat import Flat


BACKENDS = {"gloo": "gloo", "nccl": "cpu:gloo,cuda:nccl"}
"""By the device of what is exchanged: metrics are on the CPU, gradients on the GPU."""


def join(
    exchange: str, topology: Topology, timeout_seconds: float, store: Store
) -> None:
    """All workers: the process group."""
    dist.init_process_group(
        BACKENDS[exchange],
        store=store,
        rank=topology.rank,
        world_size=topology.workers,
        timeout=timedelta(seconds=timeout_seconds),
    )


class GlooExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self,
        flat: Flat,
        shares: list[Range],
        topology: Topology,
        compression: Compression = EXACT,
    ) -> None:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps."""
        self.workers, self._rank, self._flat = len(shares), topology.rank, flat
        self._num_crossings = topology.nodes if topology.nodes > 1 else 0
        self._num_leaves, self._rounding = shares[-1][1], compression
        self._sent_as = compression.sent_as(flat.dtype)
        self.parameters = torch.zeros(flat.size, device=flat.device, dtype=flat.dtype)
        self.owned = (0, flat.size)
        self.states = list(
            self.parameters.new_zeros(len(flat.layout.states), flat.size)
        )
        self._position = {id(p): i for i, p in enumerate(flat.parameters)}
        self._gradient = torch.zeros_like(self.parameters)
        self._views = flat.views(self._gradient)
        self.watch = Watch(self._num_leaves, len(flat.parameters))
        self._ddp: DistributedDataParallel | None = None
        self._stack: list[list[Tensor]] = []
        self._memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._pending: list[tuple[Sequence[Tensor], Tensor, dist.Work]] = []
        self.assign(shares)

    def assign(self, shares: list[Range]) -> None:
        """All workers, between two steps: who owns which micro-batches."""
        self._owned = shares[self._rank]
        flat = self._flat
        self._tails = Partials(shares, self._rank, flat.device)
        self._merges, self._rows = self._tails.merges, self._tails.rows
        self._memory.clear()
        self._is_direct = self._rows == 1 and self._rounding.is_exact
        gradient = sum(p.numel() for p in flat.parameters)
        row = self._sent_as.itemsize * gradient + flat.dtype.itemsize * flat.tail
        # Gloo gathers around a ring: whatever is sent passes every edge but one, and
        # as many edges as there are nodes lead from one node to the next.
        passing = (self.workers - 1) * self._rows * row
        self.bytes_per_step = self.workers * passing
        self.network_bytes_per_step = self._num_crossings * passing

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """All workers: the parameters of rank 0; to overlap, in DDP with our hook.

        DDP waits for every parameter, and takes none twice. So what may skip some, or
        reach one in several backward passes (as reentrant checkpoints of one layer
        do), is exchanged when the last backward pass is over.
        """
        self._flat.bind(self.parameters, write=True)
        if not overlap:
            if self.workers > 1:
                dist.broadcast(self.parameters, src=0)
            return objective
        self._ddp = DistributedDataParallel(
            objective, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        self._ddp.register_comm_hook(self, _launch)
        return self._ddp

    def accumulate(self, leaf: int) -> AbstractContextManager[None]:
        """The context of a forward and backward pass: the last own one is exchanged."""
        is_last = self.workers > 1 and leaf == self._owned[1] - 1
        if self._ddp is None or is_last:
            return nullcontext()
        return self._ddp.no_sync()

    def after_backward(self, leaf: int) -> None:
        """After the backward pass of `leaf`: takes its gradients up the tree."""
        if self._flat.tail:
            self._tails.push(leaf, self._flat.read_buffers())
        if self._pending:  # the last own leaf went up in the hook
            return
        self._stack.append(self._flat.gradients())
        if self.watch.active:
            self.watch.note(leaf, self._stack[-1])
        for parameter in self._flat.parameters:
            parameter.grad = None
        self._round(self._stack[-1])
        for _ in range(self._merges[leaf]):
            right = self._stack.pop()
            torch._foreach_add_(self._stack[-1], right)
            self._round(self._stack[-1])

    def _round(self, gradients: list[Tensor]) -> None:
        for gradient in gradients:
            self._rounding(gradient)

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: the gradient, and the sum of the tails."""
        if self._ddp is None and self.workers > 1:
            self._send_all()
        elif self._owned[0] == self._owned[1]:
            self._take_part()
        for parameters, received, work in self._pending:
            work.wait()
            total = self._tails.add_up(
                received.to(self._flat.dtype), self._rounding.add
            )
            offset = 0
            for parameter in parameters:
                part = total[offset : offset + parameter.numel()]
                self._views[self._position[id(parameter)]].copy_(
                    part.view_as(parameter)
                )
                parameter.grad = None
                offset += parameter.numel()
        if not self._pending:
            torch._foreach_copy_(self._views, self._stack[0])
        tails = torch.empty(0)
        if self._flat.tail:
            tails = self._tails.total(self._flat.tail, self._flat.dtype)
        self._stack.clear()
        self._pending.clear()
        self._rounding.check(self._gradient)
        return self._gradient, tails

    def _take_part(self) -> None:
        """A worker without micro-batches: a pass over no samples calls the hook."""
        assert self._ddp is not None
        loss, _ = self._ddp(torch.empty(0), torch.empty(0, dtype=torch.int64))
        loss.backward()

    def all_gather_parameters(self) -> None:
        """Every worker has updated its own copy."""

    def merge(self, values: Tensor) -> Tensor:
        """All workers: float64 cells that only one worker has filled, from each."""
        if self.workers > 1:
            dist.all_reduce(values)
        return values

    def merge_slices(self, values: Tensor) -> Tensor:
        """Every worker has filled all cells."""
        return values

    def launch(self, bucket: GradBucket) -> None:
        """Sends the own partials of a bucket: it holds the last own leaf's gradient."""
        parameters, last = bucket.parameters(), bucket.gradients()
        if self._owned[0] == self._owned[1]:
            self._send(bucket, [])
            return
        index = [self._position[id(p)] for p in parameters]
        if self.watch.active:
            self.watch.note(self._owned[1] - 1, last, index)
        self._rounding(bucket.buffer())
        num_complete = len(self._stack) - self._merges[self._owned[1] - 1]
        for left in reversed(self._stack[num_complete:]):
            torch._foreach_add_(last, [left[i] for i in index])
            self._rounding(bucket.buffer())
        complete = [[left[i] for i in index] for left in self._stack[:num_complete]]
        self._send(bucket, complete)

    def _send(self, bucket: GradBucket, complete: list[list[Tensor]]) -> None:
        """Partials before the one in the bucket, then that one."""
        buffer = bucket.buffer()
        rows = 0 if self._is_direct else self._rows
        sent, received = self._buffers(bucket.index(), rows, buffer.numel())
        if self._is_direct:
            sent = buffer.view(1, -1)
        else:
            sent[len(complete)].copy_(buffer)
        self._gather(bucket.parameters(), complete, sent, received)

    def _send_all(self) -> None:
        """All workers, after their backward passes: the own partials."""
        size = sum(p.numel() for p in self._flat.parameters)
        sent, received = self._buffers(0, self._rows, size)
        self._gather(self._flat.parameters, self._stack, sent, received)

    def _gather(
        self,
        parameters: Sequence[Tensor],
        partials: list[list[Tensor]],
        sent: Tensor,
        received: Tensor,
    ) -> None:
        for row, partial in enumerate(partials):
            torch.cat([gradient.view(-1) for gradient in partial], out=sent[row])
        work = dist.all_gather_single(received.view(-1), sent.view(-1), async_op=True)
        self._pending.append((parameters, received, work))

    def _buffers(self, number: int, rows: int, size: int) -> tuple[Tensor, Tensor]:
        """[rows, n] to send and [workers * rows, n] to receive, kept for reuse."""
        key, dtype = (number, size), self._sent_as
        if key not in self._memory:
            like, most = self.parameters, self.workers * self._rows
            sent = like.new_zeros(rows, size, dtype=dtype)
            self._memory[key] = sent, like.new_empty(most, size, dtype=dtype)
        return self._memory[key]


# DDP compares these annotations with its own types.
def _launch(state: GlooExchange, bucket: GradBucket) -> Future[Tensor]:
    state.launch(bucket)
    buffer = bucket.buffer()
    done: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else [])
    done.set_result(buffer)
    return done
