"""The gradient of a global batch, from micro-batches that the user computes."""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from samestep.core.ownership import lengths, shares
from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.exchange.gloo import GlooExchange
from samestep.loop.balancing import Balance, Ownership
from samestep.loop.changes import LoopFlat
from samestep.loop.connection import Choice, LoopExchange, connect
from samestep.loop.guard import Guard
from samestep.loop.metrics import Piece, Tally
from samestep.loop.overlap import OverlappingGloo
from samestep.loop.weighing import Weights
from samestep.models.user_model import check_parameters, check_types
from samestep.state.flat import dense
from samestep.user_code import seeding
from samestep.verification.dry_run import check_gradients, constant_buffers
from samestep.verification.mutation_check import MutationCheck


WHO = "the model"
TYPE = "Trained parameters are all float32, or all float64 (`model.double()`)"
Reduction = Literal["mean", "sum"]


class Engine:
    """One worker's part in the steps of a loop."""

    def __init__(
        self,
        model: nn.Module,
        micro_batches: int,
        place: tuple[int, int],
        reduction: Reduction,
        exchange: Choice,
        balance: Balance,
        timeout_seconds: float,
    ) -> None:
        """All workers: connect. `place` is the rank and the number of workers."""
        self._model, self._reduction = model, reduction
        self._micro_batches = micro_batches
        self._rank, _ = place
        self._ownership = Ownership(balance, micro_batches, place)
        self._choice, self._timeout_seconds = exchange, timeout_seconds
        self.weights, self._guard = Weights(micro_batches), Guard()
        self._generators = seeding.Generators()
        self._is_checked = False
        self._flatten()

    @property
    def share(self) -> tuple[int, int]:
        """This worker's micro-batches, from the first to before the last."""
        return self._ownership.shares[self._rank]

    @property
    def exchange_name(self) -> str:
        """How the workers sum."""
        return "gloo" if isinstance(self.exchange, GlooExchange) else "shared"

    def _flatten(self) -> None:
        check_parameters(self._model, WHO)
        first = next(p.dtype for p in self._model.parameters() if p.requires_grad)
        wanted = first if first is torch.float64 else torch.float32
        check_types(self._model, WHO, wanted, TYPE)
        kinds = {p.device.type for p in self._model.parameters()}
        if kinds != {"cpu"}:
            raise OwnCodeError(
                f"A loop trains on CPUs; the model is on {', '.join(sorted(kinds))}."
            )
        self._signature = _signature(self._model)
        self._flat = LoopFlat(self._model)
        # The model is not attached: parameters keep their own memory, and each worker
        # updates its own copy of all of them, with any optimizer.
        self.exchange: LoopExchange = connect(
            self._choice,
            self._flat,
            self._ownership.shares,
            self._rank,
            self._timeout_seconds,
        )
        if isinstance(self.exchange, GlooExchange):
            self._choice = "gloo"  # nor later, when parameters are frozen
        self._unchanged = MutationCheck(self._model, self._flat, WHO)

    def _follow_model(self) -> LoopFlat:
        """Return the vectors, after the user may have frozen or replaced parameters."""
        if _signature(self._model) != self._signature:
            self._flatten()
        self._flat.keep_buffers()
        self._unchanged.note()
        return self._flat

    def step(self, batch: GlobalBatch, tally: Tally) -> Iterator[Any]:
        """All workers: yield the own micro-batches of one global batch.

        At its end, every parameter's `grad` is that of the global batch.
        """
        row = tally.begin_row(self._micro_batches)
        flat, size = self._follow_model(), batch.size
        sizes = lengths(shares(size, self._micro_batches))
        self.weights.begin()
        self._ownership.clock.lap("other")
        # Random numbers between two steps must not depend on the micro-batches.
        with self._generators.kept(), self._guard.of_step(flat.parameters):
            for m in range(*self.share):
                flat.restore_buffers()
                for parameter in flat.parameters:
                    parameter.grad = None
                with self.exchange.accumulate(m):
                    if sizes[m]:
                        piece = Piece(row, m, sizes[m])
                        with tally.of(piece):
                            yield from self._pass(piece, batch)
                flat.is_weighed = m in self.weights
                self.exchange.after_backward(m)
        self._ownership.clock.lap("forward")
        self._sum(size, min(size, self._micro_batches))
        self._ownership.clock.lap("exchange")
        self._ownership.after_step(self.exchange)

    def _pass(self, piece: Piece, batch: GlobalBatch) -> Iterator[Any]:
        """Yield a micro-batch, then make its gradients ready for the exchange."""
        m, same = piece.number, self._guard.of_micro_batch(self._flat.parameters)
        sending = self._sending(piece, batch)
        with self.weights.of(m), self._checked(), same, sending:
            self._ownership.clock.lap("forward")
            fetched = batch.fetch(m)
            self._ownership.clock.lap("data")
            yield fetched
        self._unchanged.check()
        check_gradients(self._flat.parameters, WHO)
        self._give_gradients(self._factor(piece, batch))

    def _factor(self, piece: Piece, batch: GlobalBatch) -> float:
        """Return the weight of a micro-batch in the gradient of the global batch."""
        count = self.weights.count(piece.number, piece.samples)
        return count / batch.size if self._reduction == "mean" else 1.0

    def _give_gradients(self, factor: float) -> None:
        """Give the exchange what the gradients add to that of the whole global batch.

        These are copies, since the exchange adds to them: a user may keep what is in
        `grad`.
        """
        for parameter in self._flat.parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or not factor:  # the mean over no targets may be NaN
                continue
            place = self.exchange.place(parameter)
            scaled = torch.mul(dense(gradient.detach()), factor, out=place)
            if place is None:
                parameter.grad = scaled

    def _sending(
        self, piece: Piece, batch: GlobalBatch
    ) -> AbstractContextManager[None]:
        """Return the context of a pass whose gradients may be sent before its end."""
        if not isinstance(self.exchange, OverlappingGloo):
            return nullcontext()
        return self.exchange.sending(piece.number, partial(self._factor, piece, batch))

    def _sum(self, size: int, with_samples: int) -> None:
        """All workers: set gradients and buffers to those of the global batch."""
        flat = self._flat
        gradients, tail = self.exchange.whole_sum()
        weighed = flat.num_weighed(tail)
        count = self.weights.total(self.exchange, weighed, with_samples)
        if count:
            factor = (size if self._reduction == "mean" else 1) / count
            if factor != 1:  # as where each sample has one target
                torch._foreach_mul_(gradients, factor)
        elif count == 0:
            torch._foreach_zero_(gradients)
            self._warn_of_no_targets()
        for parameter, gradient in zip(flat.parameters, gradients, strict=True):
            parameter.grad = gradient
        flat.advance(tail, self._micro_batches)

    def _warn_of_no_targets(self) -> None:
        if self._rank == 0:
            warnings.warn(
                "No target of this step counts: `weigh` received 0 in each of its "
                "micro-batches. The gradient is zero.",
                stacklevel=5,
            )

    @contextmanager
    def _checked(self) -> Iterator[None]:
        """Check, in the first micro-batch, which buffers a pass changes."""
        if self._is_checked:
            yield
            return
        before = {name: b.clone() for name, b in self._model.named_buffers()}
        yield
        constant_buffers(self._model, before, WHO)
        self._is_checked = True


def _signature(module: nn.Module) -> list[tuple[int, bool, torch.dtype]]:
    """Return what decides which parameters of a model are trained.

    In a step this takes a quarter of the time of `parameters()`.
    """
    found = [
        (id(parameter), parameter.requires_grad, parameter.dtype)
        for parameter in module._parameters.values()
        if parameter is not None
    ]
    for inner in module._modules.values():
        if inner is not None:
            found += _signature(inner)
    return found
