"""The training loop of a script, which runs one micro-batch in each iteration."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor, nn

from samestep.accelerate.gathering import Gathering
from samestep.accelerate.loader import PreparedLoader
from samestep.accelerate.step import Step
from samestep.core.ownership import lengths, shares
from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.loop.loop import Loop


class Training:
    """Knows the current micro-batch, and what a script has done with it."""

    def __init__(self, model: nn.Module, loop: Loop, micro_batches: int) -> None:
        self.model, self.loop = model, loop
        self.gathering: Gathering | None = None
        """That of the current global batch."""
        self._micro_batches, self._state = micro_batches, GradientState()
        self._step: Step | None = None
        self._accumulated: list[Tensor] | None = None
        """Gradients of earlier global batches, for the same step of the optimizer."""
        self._is_due = False
        """Whether the optimizer is to make a step."""
        self._buffers: list[Tensor] = []
        """As the next micro-batch of this global batch is to find them."""

    @property
    def is_on(self) -> bool:
        """Whether an iteration that begins now is one of a training."""
        return self.model.training and torch.is_grad_enabled()

    def epoch(self, loader: PreparedLoader) -> Iterator[Any]:
        """All processes: yield the own micro-batches of an epoch."""
        progress, data = loader.progress, loader.base_dataloader
        epoch, start = progress.epoch, loader.start
        bookmark = progress.begin(epoch, start)
        self._progress = progress
        batches = self.loop.global_batches(
            data, epoch=epoch, start=start, bookmark=bookmark
        )
        for index, (batch, is_end) in enumerate(_with_end(batches), start + 1):
            self.gathering = Gathering()
            step = self._step = self._begin(batch, loader)
            step.is_update = is_end or index % self._state.num_steps == 0
            following = epoch, index, batch.bookmark
            step.following = (epoch + 1, 0, None) if is_end else following
            yield from self._iterations(step)
            if self._is_due:
                raise OwnCodeError(
                    "After each global batch the optimizer makes a step, and none was "
                    "made. Call the `step` of the optimizer from `prepare` in every "
                    "iteration; it acts where `accelerator.sync_gradients` is true. "
                    "(To accumulate, use `gradient_accumulation_steps`.)"
                )
        self.gathering = None
        self.loop.fingerprint()  # a script may have changed weights in one process

    def _begin(self, batch: GlobalBatch, loader: PreparedLoader) -> Step:
        first, end = shares(self._micro_batches, self.loop.workers)[self.loop.rank]
        sizes = lengths(shares(batch.size, self._micro_batches))[first:end]
        own = sum(1 for size in sizes if size)
        return Step(self.loop, batch, own, (self.model, loader.base_dataloader))

    def _iterations(self, step: Step) -> Iterator[Any]:
        assert self.gathering is not None
        for micro_batch in step:
            self._state._set_sync_gradients(step.is_last and step.is_update)
            self.gathering.begin(step.samples, step.is_last)
            yield micro_batch
            if step.has_gradient and not step.is_whole:
                self._check_buffers()

    def _check_buffers(self) -> None:
        now = self.model.buffers()
        if not all(map(torch.equal, now, self._buffers)):
            raise OwnCodeError(
                "Buffers, such as the statistics of BatchNorm, stay as they are from "
                "`accelerator.backward` to the next micro-batch, and a script has "
                "changed them. Call the model in training mode only for the loss."
            )

    def backward(self, loss: Tensor, **options: Any) -> None:
        """All processes: compute gradients; in the last own iteration, sum them all."""
        step = self._at_hand("`accelerator.backward`")
        if not step.is_left_out:
            torch.autograd.backward(loss, **options)
        step.go_on()
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]
        if step.is_whole:
            self._accumulate(step.is_update)
            self._progress.reach(*step.following)
            self._is_due = step.is_update

    def weigh(self, count: float) -> None:
        """Set how many targets the current loss is over."""
        if not self._at_hand("`accelerator.weigh`, before `backward`,").is_left_out:
            self.loop.weigh(count)

    def _at_hand(self, what: str) -> Step:
        step = self._step
        if step is None or step.has_gradient:
            raise OwnCodeError(
                f"{what} is called once in each iteration of a loop over a loader from "
                "`prepare`, with the model in training mode; several losses are added "
                "up before."
            )
        return step

    def _accumulate(self, is_update: bool) -> None:
        """Add the gradients of the global batch to those of earlier ones."""
        batches = self._state.num_steps
        if batches == 1:
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        shares = [p.grad / batches for p in trained]
        if self._accumulated is not None:
            shares = [a + b for a, b in zip(self._accumulated, shares, strict=True)]
        self._accumulated = None if is_update else shares
        for parameter, share in zip(trained, shares, strict=True):
            parameter.grad = share if is_update else None

    def note_step(self, *_: Any) -> None:
        """Note that an optimizer has made a step."""
        self._is_due = False

    def check_between_steps(self, what: str) -> None:
        """Raise OwnCodeError in the middle of a step of the optimizer."""
        step = self._step
        if step and not (step.is_whole and step.is_update and not self._is_due):
            raise OwnCodeError(
                f"{what} has its place between two steps of the optimizer, where all "
                "processes meet: after `optimizer.step()`, under `if "
                "accelerator.sync_gradients`. Count steps there, too: processes have "
                "several iterations for each."
            )


def _with_end(batches: Iterable[GlobalBatch]) -> Iterator[tuple[GlobalBatch, bool]]:
    """Yield each with whether it is the last."""
    iterator = iter(batches)
    before = next(iterator, None)
    while before is not None:
        following = next(iterator, None)
        yield before, following is None
        before = following
