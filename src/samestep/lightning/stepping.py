"""What `training_step` steps by hand makes one step for all micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from samestep.errors import OwnCodeError
from samestep.lightning.manual import Manual
from samestep.lightning.turn import Request


@contextmanager
def together(manual: Manual, trainer: Any) -> Iterator[None]:
    """Let steps of optimizers and schedulers in micro-batches wait for each other."""
    optimizers = trainer.strategy._lightning_optimizers  # what `optimizers()` returns
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    with ExitStack() as opened:
        for function, stepped in (
            (_step_optimizer, optimizers),
            (_step_scheduler, schedulers),
        ):
            for number, each in enumerate(stepped):
                each.step = partial(function, manual, number, each, each.step)
                opened.callback(delattr, each, "step")
        yield


def _step_optimizer(
    manual: Manual,
    number: int,
    optimizer: Any,
    step: Callable[..., Any],
    closure: Callable[[], Any] | None = None,
    **options: Any,
) -> Any:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OwnCodeError(
            "LBFGS computes its loss several times in one step, and the micro-batches "
            "of a global batch make each step together. Use an optimizer that needs "
            "one pass."
        )
    result = closure() if closure is not None else None
    manual.meet(Request("a step of an optimizer", number), partial(step, **options))
    return result


def _step_scheduler(
    manual: Manual, number: int, _: Any, step: Callable[..., Any], *given: Any
) -> None:
    arguments = ", ".join(str(float(value)) for value in given)
    request = Request("a step of a scheduler", number, arguments)
    manual.meet(request, partial(step, *given))
