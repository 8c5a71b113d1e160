"""Refuses changes of the weights between the micro-batches of one step.

All gradients of a step are taken at the same weights. If these change after one of its
micro-batches, each worker computes the next ones with other weights than the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samestep.errors import OwnCodeError


CHANGED = (
    "The weights stay as they are until the gradients of all micro-batches of a step "
    "are summed, and in the loop over the micro-batches {}. Call `optimizer.step()` "
    "after that loop. Networks that take turns, as in a GAN, have a `Loop` each."
)


class Guard:
    """Watches the weights of one loop."""

    def __init__(self) -> None:
        self._now: WeakSet[Optimizer] = WeakSet()
        """Optimizers that have made a step in the current micro-batch."""
        self._before: WeakSet[Optimizer] = WeakSet()
        """And in earlier ones: these carry state from one to the next."""
        self._trained: dict[int, Tensor] = {}
        """What is trained, by its identity; kept, so that nothing else takes it."""

    @contextmanager
    def of_step(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Watch the optimizers while the user computes the micro-batches of a step.

        An optimizer that is made for one micro-batch, for example to attack its inputs,
        may make steps. The `step` of any other raises OwnCodeError.
        """
        trained = self._trained = {id(p): p for p in parameters}
        _watching().add(self)
        try:
            yield
        finally:
            # One that was abandoned may end while the next is under way.
            if self._trained is trained:
                _watching().discard(self)

    def check(self, optimizer: Optimizer) -> None:
        """Raise OwnCodeError if a step of this optimizer is not allowed now."""
        groups = optimizer.param_groups
        is_ours = any(id(p) in self._trained for g in groups for p in g["params"])
        if is_ours or optimizer in self._before:
            raise OwnCodeError(CHANGED.format("an optimizer made a step"))
        self._now.add(optimizer)

    @contextmanager
    def of_micro_batch(self, parameters: Sequence[Tensor]) -> Iterator[None]:
        """Watch the weights in one micro-batch. Raises OwnCodeError at its end."""
        versions = [parameter._version for parameter in parameters]
        yield
        if versions != [parameter._version for parameter in parameters]:
            raise OwnCodeError(CHANGED.format("they were changed"))
        self._before |= self._now
        self._now.clear()


@cache
def _watching() -> WeakSet[Guard]:
    """Return the guards that are within a step.

    Torch's hook for all optimizers is registered once and stays. One for each step
    would be removed with it, and a step that a script has left in the middle ends when
    Python collects it, perhaps while torch iterates over its hooks.
    """
    guards: WeakSet[Guard] = WeakSet()

    def check(optimizer: Optimizer, *_: Any) -> None:
        for guard in tuple(guards):
            guard.check(optimizer)

    register_optimizer_step_pre_hook(check)
    return guards
