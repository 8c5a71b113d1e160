"""Sums over Gloo that begin while the last backward pass of a user's own loop runs.

Gradients leave in buckets, as with DDP, from the last parameters to the first, when
hooks of a worker's last micro-batch find those of a bucket complete. A script may do
more with them: clip them, call `backward` again, weigh the loss afterwards. So what was
sent is compared with what the micro-batch left, bit by bit. If it differs on one
worker, all of them sum again after their passes, and do so from then on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange.gloo import GlooExchange
from samestep.loop.changes import LoopFlat
from samestep.state.flat import dense
from samestep.system import log


BUCKET_BYTES = 4 * 2**20
"""Between the 1 MB of DDP's first bucket and the 25 MB of its others; other sizes were
not measured."""
CHANGED = (
    "Gradients are sent after the backward passes from now on: in a step they changed "
    "after `backward`, or `weigh` was called after it."
)


@dataclass
class Bucket:
    """Parameters whose gradients are sent together; the names are those of DDP's."""

    number: int
    places: list[int]
    """Where its parameters are among all."""
    members: list[Tensor]
    memory: Tensor
    """[n], of all of its gradients."""

    def index(self) -> int:
        """Return its number."""
        return self.number

    def parameters(self) -> list[Tensor]:
        """Return the parameters."""
        return self.members

    def buffer(self) -> Tensor:
        """Return the memory of the gradients, [n]."""
        return self.memory

    def gradients(self) -> list[Tensor]:
        """Return views of the memory, one for each parameter."""
        parts = torch.split(self.memory, [m.numel() for m in self.members])
        return [part.view_as(m) for part, m in zip(parts, self.members, strict=True)]


class OverlappingGloo(GlooExchange):
    """A Gloo exchange that sends while gradients are still computed."""

    def __init__(
        self, flat: LoopFlat, shares: list[Range], topology: Topology, are_alone: bool
    ) -> None:
        """All workers: make the buckets, and a group in which only they are sent.

        `are_alone` says whether each worker is the only one of its machine.
        """
        super().__init__(flat, shares, topology)
        self._loop_flat = flat
        group = self._group = _group_for_gradients(dist.group.WORLD)
        self._send_to, self._receive_from = group.send, group.recv
        self._buckets = _buckets(flat.parameters)
        self._bucket_of = {p: b.number for b in self._buckets for p in b.places}
        # The last bucket is complete only when the backward pass is over.
        self._is_early = len(self._buckets) > 1
        """Whether gradients leave early, the same on all workers."""
        self._sent: dict[int, Tensor | None] = {}
        """What was sent of each parameter, by its place."""
        self._begun = False
        """Whether a step is under way; all buckets of one are sent, sooner or later."""
        self._are_alone = are_alone
        self._arriving: list[list[dist.Work]] = []
        """The receipts of the next buckets, begun before anything is sent."""

    def accumulate(self, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of a forward and backward pass."""
        if micro_batch == self._owned[0]:
            self._end_abandoned()
            self._begun = True
        return super().accumulate(micro_batch)

    def _end_abandoned(self) -> None:
        """All workers: send what is left of a step that the script has given up.

        Some may have sent more of it than others.
        """
        if self._begun and self._is_early:
            self._send_rest(0.0)
            for arrive in self._arrivals:
                arrive()
        self._sent.clear()

    @contextmanager
    def sending(self, micro_batch: int, factor: Callable[[], float]) -> Iterator[None]:
        """Send gradients inside while others are computed, in the last own micro-batch.

        `factor` returns its weight in the gradient of the global batch, as known then.
        """
        if not self._is_early or micro_batch != self._owned[1] - 1:
            yield
            return
        self._expect_buckets()
        missing = [set(bucket.places) for bucket in self._buckets]

        def arrived(place: int, _: Tensor) -> None:
            missing[self._bucket_of[place]].discard(place)
            # All workers send the buckets in one order.
            while (n := self._next) < len(missing) and not missing[n]:
                self._send(self._buckets[n], factor())

        with ExitStack() as hooks:
            for place, parameter in enumerate(self._flat.parameters):
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(arrived, place)
                )
                hooks.callback(handle.remove)
            yield

    @property
    def _next(self) -> int:
        """The bucket to send next."""
        return len(self._arrivals)

    def _send(self, bucket: Bucket, factor: float) -> None:
        is_added_to = self._sums.merges.get(self._owned[1] - 1, 0) > 0
        for place, parameter, view in zip(
            bucket.places, bucket.members, bucket.gradients(), strict=True
        ):
            gradient, self._sent[place] = parameter.grad, None
            if gradient is None or not factor:
                view.zero_()
                continue
            torch.mul(dense(gradient.detach()), factor, out=view)
            self._sent[place] = view.clone() if is_added_to else view
        self.send_bucket(bucket)

    def _expect_buckets(self) -> None:
        """Announce to the others that their buckets can be sent.

        Later it would wait behind the buckets that are being sent to them.
        """
        if self._are_alone:
            for bucket in self._buckets:
                _, received = self._memory_of(bucket)
                self._arriving.append(self._receive(received))

    def _receive(self, received: Tensor) -> list[dist.Work]:
        """Begin to receive the partials [workers * rows, n] of all others."""
        return [
            self._receive_from([part.view(-1)], worker, 0)
            for worker, part in enumerate(received.chunk(self.workers))
            if worker != self._rank
        ]

    def _all_gather(self, received: Tensor, sent: Tensor) -> list[dist.Work]:
        """All workers: begin to gather what each sends; return what to wait for.

        Between machines of one worker each, directly: Gloo's ring announces nothing,
        and takes 1.5 times what the bytes need.
        """
        if not self._are_alone:
            return super()._all_gather(received, sent)
        works = self._arriving.pop(0) if self._arriving else self._receive(received)
        received.chunk(self.workers)[self._rank].copy_(sent)
        others = (worker for worker in range(self.workers) if worker != self._rank)
        return works + [self._send_to([sent.view(-1)], w, 0) for w in others]

    def _send_rest(self, factor: float) -> None:
        for bucket in self._buckets[self._next :]:
            self._send(bucket, factor)

    def after_backward(self, micro_batch: int) -> None:
        """Take the gradients of a micro-batch up the tree, or note if they changed."""
        if self._is_early and micro_batch == self._owned[1] - 1:
            self._send_rest(1.0)  # they have been multiplied
            self._loop_flat.has_changed = not all(
                _same_bits(self._sent[place], parameter.grad)
                for place, parameter in enumerate(self._flat.parameters)
            )
        super().after_backward(micro_batch)
        self._loop_flat.has_changed = False

    def whole_sum(self) -> tuple[list[Tensor], Tensor]:
        """All workers: return the gradient of each parameter, and the sum of tails."""
        if not self._is_early:
            return super().whole_sum()
        sums, tails = [*self._sums.values], [*self._tails.values]
        last = self._flat.gradients()
        total, tail = super().whole_sum()
        self._begun = False
        self._sent.clear()
        if not self._loop_flat.have_changed(tail):
            return total, tail
        self._is_early = False
        if self._rank == 0:
            log.logger.info(CHANGED)
        self._memory.clear()  # made for buckets
        self._sums.values, self._tails.values = sums, tails
        self._sums.push(self._owned[1] - 1, last)
        return super().whole_sum()


def _buckets(parameters: Sequence[Tensor]) -> list[Bucket]:
    """Return buckets of all parameters, the last ones first.

    Backward passes reach these first.
    """
    groups: list[list[int]] = [[]]
    room = BUCKET_BYTES
    for place in reversed(range(len(parameters))):
        if room <= 0:
            groups.append([])
            room = BUCKET_BYTES
        groups[-1].append(place)
        room -= parameters[place].nbytes
    buckets = []
    for number, places in enumerate(groups):
        members = [parameters[place] for place in places]
        memory = members[0].new_zeros(sum(m.numel() for m in members))
        buckets.append(Bucket(number, places, members, memory))
    return buckets


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    as_integer = torch.int32 if one.dtype is torch.float32 else torch.int64
    return torch.equal(one.view(as_integer), other.view(as_integer))


@cache
def _group_for_gradients(_: dist.ProcessGroup) -> dist.ProcessGroup:
    """All workers: make a group beside the one that is there.

    Only their order distinguishes the messages of a group. Between two buckets a script
    may send others, or give the step up.
    """
    group: dist.ProcessGroup = dist.new_group(backend="gloo")
    return group
