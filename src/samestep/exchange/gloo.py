"""The exchange over a process group's collectives.

Each worker sums the gradients of its own micro-batches up to the maximal subtrees of
the canonical tree (`samestep.tree`); these partials are all-gathered, and every worker
adds them in the order of the tree. The collectives start inside DDP's backward pass,
bucket by bucket, as its communication hook; the sums are taken after it, on the
worker's own thread, since the flush-to-zero mode belongs to a thread and decides bits.

With p workers of k partials each, a worker receives (p - 1) k times the gradient.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from samestep import tree
from samestep.tree import Node


class GlooExchange:
    """Sums the gradients of one step; all workers take part in every step."""

    def __init__(
        self, ddp: DistributedDataParallel, shares: list[Node], rank: int
    ) -> None:
        """`shares[r]` is the range of micro-batches of worker `r`, without gaps."""
        num_leaves = shares[-1][1]
        self._ddp = ddp
        self._num_leaves = num_leaves
        self._owned = shares[rank]
        self._parameters = [p for p in ddp.parameters() if p.requires_grad]
        self._position = {id(p): i for i, p in enumerate(self._parameters)}
        self._merges = {
            leaf: tree.num_merges(leaf, self._owned, num_leaves)
            for leaf in range(*self._owned)
        }
        contributed = [tree.subtrees(owned, num_leaves) for owned in shares]
        self._rows = max(map(len, contributed))
        self._nodes = {
            node: worker * self._rows + row
            for worker, nodes in enumerate(contributed)
            for row, node in enumerate(nodes)
        }
        self._stack: list[list[Tensor]] = []
        self._memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._pending: list[tuple[list[Tensor], Tensor, dist.Work]] = []
        ddp.register_comm_hook(self, _launch)

    def turn(self, leaf: int) -> AbstractContextManager[None]:
        """The context of a forward and backward pass: the last own one is exchanged."""
        if len(self._nodes) > 1 and leaf == self._owned[1] - 1:
            return nullcontext()
        return self._ddp.no_sync()

    def collect(self, leaf: int) -> None:
        """After the backward pass of `leaf`: takes its gradients up the tree."""
        if self._pending:
            return  # the last own leaf went up in the hook
        self._stack.append([_gradient(p) for p in self._parameters])
        for parameter in self._parameters:
            parameter.grad = None
        for _ in range(self._merges[leaf]):
            right = self._stack.pop()
            torch._foreach_add_(self._stack[-1], right)

    def finish(self) -> None:
        """Puts the sum over all micro-batches into the parameters' `grad`."""
        for parameters, received, work in self._pending:
            work.wait()
            rows = {node: received[row] for node, row in self._nodes.items()}
            total = tree.reduce(self._num_leaves, rows, Tensor.add_)
            offset = 0
            for parameter in parameters:
                end = offset + parameter.numel()
                parameter.grad = total[offset:end].view_as(parameter)
                offset = end
        if not self._pending:
            for parameter, gradient in zip(
                self._parameters, self._stack[0], strict=True
            ):
                parameter.grad = gradient
        self._stack.clear()
        self._pending.clear()

    def release(self) -> None:
        """Before the next step's first backward pass: gradients start from nothing."""
        for parameter in self._parameters:
            parameter.grad = None

    def launch(self, bucket: GradBucket) -> None:
        """Sends the own partials of a bucket: it holds the last own leaf's gradient."""
        parameters, last = bucket.parameters(), bucket.gradients()
        index = [self._position[id(p)] for p in parameters]
        num_complete = len(self._stack) - self._merges[self._owned[1] - 1]
        for left in reversed(self._stack[num_complete:]):
            torch._foreach_add_(last, [left[i] for i in index])
        complete = [[left[i] for i in index] for left in self._stack[:num_complete]]
        sent, received = self._buffers(bucket)
        for row, partial in enumerate(complete):
            torch.cat([gradient.view(-1) for gradient in partial], out=sent[row])
        if self._rows > 1:
            sent[len(complete)].copy_(bucket.buffer())
        work = dist.all_gather_single(received.view(-1), sent.view(-1), async_op=True)
        self._pending.append((parameters, received, work))

    def _buffers(self, bucket: GradBucket) -> tuple[Tensor, Tensor]:
        """[rows, n] to send and [workers * rows, n] to receive, kept for reuse."""
        buffer = bucket.buffer()
        key = (bucket.index(), buffer.numel())
        if key not in self._memory:
            size = buffer.numel()
            sent = buffer.new_zeros(self._rows if self._rows > 1 else 0, size)
            received = buffer.new_empty(dist.get_world_size() * self._rows, size)
            self._memory[key] = sent, received
        sent, received = self._memory[key]
        return (sent if self._rows > 1 else buffer.view(1, -1)), received


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


# DDP compares these annotations with its own types.
def _launch(state: GlooExchange, bucket: GradBucket) -> Future[Tensor]:
    state.launch(bucket)
    done: Future[Tensor] = Future()
    done.set_result(bucket.buffer())
    return done
