"""Manual optimization: `training_step` makes the steps, for a whole global batch.

It is called for each micro-batch of this process. Where it computes a backward pass or
makes a step, it is suspended until all micro-batches, of all processes, have come to
the same place. Then the gradients of all are summed, or one step is made for all.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from itertools import chain
from operator import or_
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.lightning.gradients import DIFFER, Gradients
from samestep.lightning.lending import Lending
from samestep.lightning.metrics import Metrics
from samestep.lightning.turn import END, Request, State, Turn
from samestep.loop.changes import LoopFlat
from samestep.loop.loop import Batches, Loop
from samestep.user_code import seeding
from samestep.verification.mutation_check import MutationCheck


WHO = "`training_step`"
BACKWARD = Request("a backward pass")
SUMMED = Request("the end of a backward pass")
Act = Callable[[], Any]
APART = (
    "All micro-batches of a global batch make the same steps in the same order; one "
    "has come to {}, another to {}. Let nothing that depends on samples decide about "
    "backward passes and steps."
)


class Manual:
    """The steps of one module whose optimization is manual."""

    def __init__(
        self, loop: Loop, micro_batches: int, module: Any, after_backward: Act
    ) -> None:
        """`after_backward` is called when gradients have been summed."""
        self._loop, self._module, self._micro_batches = loop, module, micro_batches
        self._after_backward = after_backward
        self._flat = LoopFlat(module)
        self._unchanged = MutationCheck(module, self._flat, WHO)
        self._turn: Turn | None = None
        """That of the micro-batch that runs."""
        self._actions: dict[Request, Act] = {}
        """What to do when all micro-batches have come to a place."""

    @property
    def is_running(self) -> bool:
        """Whether a micro-batch is computed now."""
        return self._turn is not None

    def meet(self, request: Request, act: Act) -> None:
        """In a micro-batch: wait for the others; `act` is then called once for all."""
        assert self._turn is not None
        self._actions.setdefault(request, act)
        self._turn.suspend(request)

    def backward(self, compute: Act) -> None:
        """In a micro-batch: compute gradients, which become those of the batch."""
        assert self._turn is not None
        self._turn.suspend(BACKWARD)
        compute()
        self._turn.suspend(SUMMED)

    def step(
        self, batch: GlobalBatch, compute: Callable[[Any], Any], metrics: Metrics
    ) -> None:
        """All processes: call `compute` with each micro-batch. Raises OwnCodeError."""
        self._size = batch.size
        self._turns: list[Turn] = []
        self._stand_in: Turn | None = None
        """The turn of a micro-batch of another process, if this one has none."""
        self._follow_module()
        with ExitStack() as opened:
            hook = register_optimizer_step_pre_hook(self._refuse_own_step)
            opened.callback(hook.remove)

            def begin(piece: Any) -> Turn:
                turn = Turn(self._module, metrics, partial(compute, piece))
                opened.callback(turn.close)
                return turn

            lending = Lending(self._loop, batch.size, self._micro_batches)
            for piece in self._loop.measure(batch):
                lending.lend(piece)
                self._turns.append(begin(piece))
                self._run(self._turns[-1])
                self._base.give()
            if not self._turns:
                with seeding.kept():
                    self._stand_in = begin(lending.borrow())
                    self._run(self._stand_in)
            self._go_on()
        self._gradients.give()
        for turn in self._turns:
            metrics.take(turn.seen)

    def _follow_module(self) -> None:
        """Begin a step, after the user may have frozen other parameters."""
        trained = [id(p) for p in self._module.parameters() if p.requires_grad]
        if trained != [id(p) for p in self._flat.parameters]:
            self._flat = LoopFlat(self._module)
            self._unchanged = MutationCheck(self._module, self._flat, WHO)
        self._flat.keep_buffers()
        self._unchanged.note()
        self._base = State(self._module)
        self._gradients = Gradients(self._flat.parameters)

    def _refuse_own_step(self, optimizer: Any, *_: Any) -> None:
        if self.is_running and optimizer in self._module.trainer.optimizers:
            raise OwnCodeError(
                "A step is one of all micro-batches, so it is made by what "
                "`self.optimizers()` returns, without `use_pl_optimizer=False`."
            )

    def _go_on(self) -> None:
        """All processes: meet, act and run on, until all are at the end."""
        while (request := self._agree()) != END:
            if request == BACKWARD:
                self._sum()
            else:
                self._act(request)
            for turn in self._each(self._loop.measure):
                self._run(turn)
            with self._standing_in() as stand_in:
                if stand_in:
                    self._run(stand_in)
        self._average_buffers()

    def _each(self, phase: Callable[[GlobalBatch], Batches]) -> Iterator[Turn]:
        """Yield the own micro-batches, each with its state, in a phase of the loop."""
        turns = iter(self._turns)

        def fetch(_: int) -> Turn:
            turn = next(turns)
            turn.give()
            return turn

        yield from phase(GlobalBatch(self._size, fetch))

    @contextmanager
    def _standing_in(self) -> Iterator[Turn | None]:
        """Yield the micro-batch of another process, if there is none of this one."""
        with seeding.kept():
            if self._stand_in:
                self._stand_in.give()
            yield self._stand_in
        self._base.give()

    def _run(self, turn: Turn) -> None:
        """Run a micro-batch on to where it waits, with the common gradients."""
        self._gradients.give(copy=len(self._turns) > 1)
        self._resume(turn)
        self._unchanged.check()
        self._gradients.note()

    def _resume(self, turn: Turn) -> None:
        self._turn = turn
        try:
            turn.run()
        finally:
            self._turn = None

    def _agree(self) -> Request:
        """All processes: return where all micro-batches wait. Raises OwnCodeError."""
        self._base.give()
        changes = self._gradients.changes()
        turns = filter(None, [*self._turns, self._stand_in])
        every = self._loop.gather([[*turn.request, changes] for turn in turns])
        *first, changes = every[0][0]
        for *other, others_changes in chain(*every):
            if other != first:
                raise OwnCodeError(APART.format(first[0], other[0]))
            if others_changes != changes:
                raise OwnCodeError(DIFFER)
        self._gradients.settle()
        return Request(*first)

    def _act(self, request: Request) -> None:
        """Do once what all micro-batches have asked for."""
        self._gradients.give()
        self._actions.pop(request)()
        self._gradients.take()
        self._unchanged.note()

    def _sum(self) -> None:
        """All processes: compute gradients, and add those of the global batch."""
        mask, parameters = 0, self._flat.parameters
        with self._standing_in() as stand_in:
            if stand_in:
                for parameter in parameters:
                    parameter.grad = None  # those that it computes are not taken
                self._resume(stand_in)
        for turn in self._each(self._loop.step):
            self._resume(turn)
            if turn.request != SUMMED:
                raise OwnCodeError(APART.format(SUMMED.what, turn.request.what))
            found = [parameter.grad is not None for parameter in parameters]
            mask |= sum(1 << i for i, is_found in enumerate(found) if is_found)
        everywhere = reduce(or_, self._loop.gather(mask))
        self._gradients.add(everywhere)
        self._base.give()
        self._after_backward()
        self._gradients.take()

    def _average_buffers(self) -> None:
        """All processes: set buffers to the means of those of all micro-batches."""
        if self._flat.moving:
            first = self._flat.parameters[0]
            for _ in self._each(self._loop.step):
                first.grad = torch.zeros_like(first)  # a step has some gradient
            self._base.take_buffers()
        self._base.give()
