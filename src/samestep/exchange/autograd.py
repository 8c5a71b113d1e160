"""The forward and backward passes of a worker's micro-batches, one by one, by torch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from samestep.core.ownership import Share
from samestep.exchange import Exchange
from samestep.exchange.compression import Compression
from samestep.exchange.partials import PartialSums
from samestep.state import dtypes
from samestep.state.flat import Flat


Draw = Callable[[int, int, Share], tuple[Any, Any]]
"""Draws inputs and targets of a micro-batch; see `training.trainer.Samples`."""


class Instruments(Protocol):
    """What watches the passes: `training.monitor.StepMonitor`."""

    def begin_micro_batch(self) -> None:
        """Begin a micro-batch, or all of them if they are computed together."""

    def lap(self, phase: str) -> float:
        """End a phase of the step and begin the next."""

    def end_micro_batch(
        self, index: int, loss: Tensor, metrics: Tensor, num_samples: int
    ) -> None:
        """Record the loss [] and the metrics [cells] of one micro-batch."""

    def record(self, index: int, loss: float, metrics: list[float]) -> None:
        """Record the sums of a micro-batch."""

    def record_hash(self, index: int, number: int) -> None:
        """Record the hash of a micro-batch's own gradient."""

    def read_less(self, num_bytes: int) -> None:
        """Note how many bytes less all workers together read in this step."""


@dataclass(frozen=True)
class AutogradPasses:
    """Computes micro-batches with a model and its loss."""

    objective: nn.Module
    """Bound to the exchange; perhaps compiled."""
    unbound: nn.Module
    """The same for passes that the exchange does not see."""
    flat: Flat
    exchange: Exchange
    draw: Draw
    num_targets: Callable[[int], int]
    """Returns the targets of a step's global batch."""
    compression: Compression

    def run(self, step: int, owned: Share, instruments: Instruments) -> None:
        """Compute this worker's micro-batches of a step, counted from 0."""
        self._compute(step, owned, self.objective, self.exchange, instruments)

    def write(
        self,
        step: int,
        owned: Share,
        partials: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Compute any micro-batches of a step; write their partials."""
        sums = _Sums(self, owned)
        self._compute(step, owned, self.unbound, sums, instruments)
        for partial, value in zip(partials, sums.values, strict=True):
            partial.copy_(value)

    def _compute(
        self,
        step: int,
        owned: Share,
        objective: nn.Module,
        exchange: "Exchange | _Sums",
        instruments: Instruments,
    ) -> None:
        flat = self.flat
        # Losses are sums: divided by one number, uneven micro-batches get the right
        # weight.
        share = 1 / self.num_targets(step)
        weight = torch.tensor(share, dtype=flat.dtype, device=flat.device)
        for m in range(*owned):
            instruments.begin_micro_batch()
            inputs, targets = self.draw(step, m, owned)
            flat.restore_buffers()  # each begins with those of the last step
            instruments.lap("data")
            with exchange.accumulate(m), dtypes.default(flat.dtype):
                loss, metrics = objective(inputs, targets)
                instruments.lap("forward")
                # `loss.backward(weight)` would import a symbolic algebra for 0.4 s.
                (loss * weight).backward()
            exchange.after_backward(m)
            instruments.end_micro_batch(m, loss, metrics, len(targets))


class _Sums(PartialSums[Tensor]):
    """Takes gradients as an exchange does, into memory of its own."""

    def __init__(self, passes: AutogradPasses, owned: Share) -> None:
        """Begin without micro-batches of the `owned` ones."""
        self._passes, self._flat = passes, passes.flat
        super().__init__(owned, passes.exchange.shares[-1][1], self._added)

    def accumulate(self, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of the forward and backward pass of one micro-batch."""
        return nullcontext()

    def after_backward(self, micro_batch: int) -> None:
        """Take the gradients and buffers that a micro-batch left."""
        flat, watch = self._flat, self._passes.exchange.watch
        gradients, tail = flat.gradients(), flat.read_tail()
        if watch.active:
            watch.note(micro_batch, gradients)
        vector = tail.new_zeros(flat.size + flat.tail)
        for view, gradient in zip(flat.views(vector), gradients, strict=True):
            view.copy_(gradient)
        vector[flat.size :].copy_(tail)
        for parameter in flat.parameters:
            parameter.grad = None
        self.push(micro_batch, self._rounded(vector))

    def _added(self, left: Tensor, right: Tensor) -> Tensor:
        return self._rounded(left.add_(right))

    def _rounded(self, vector: Tensor) -> Tensor:
        self._passes.compression(vector[: self._flat.size])
        return vector
