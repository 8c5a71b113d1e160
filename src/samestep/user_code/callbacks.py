"""Callbacks: the user's code that looks on while a training runs.

They run in the worker of rank 0 only and get numbers, and copies of the weights; the
generators are restored after each call. So they cannot change the result. Every start
of the workers makes them anew, also after a failure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from samestep.errors import OwnCodeError, did_you_mean
from samestep.user_code import seeding
from samestep.user_code.references import GIVEN, UserCode, blaming


METHODS = (
    "on_train_start",
    "on_step_end",
    "on_evaluation_end",
    "on_snapshot",
    "on_train_end",
)


@dataclass(frozen=True)
class TrainingState:
    """What a callback gets: a training between two steps, to be read only."""

    step: int
    """Optimizer steps taken, over all epochs."""
    epoch: int
    """The epoch of the last step, counted from 1; that of the first step before it."""
    lr: float
    """Learning rate of the last step; before the first step, its own."""
    metrics: Mapping[str, float]
    """After a step `loss` and so on; after an evaluation with the name of the split,
    such as `validation_loss`; otherwise empty."""
    copy_weights: Callable[[], dict[str, Tensor]]
    """Returns a copy of the model's state_dict, on the CPU."""


class Callbacks:
    """The callbacks of a training, called by the worker of rank 0."""

    def __init__(self, references: Sequence[str], user_code: UserCode) -> None:
        """Find and make them. Raises UsageError."""
        self._all = [_made(reference, user_code) for reference in references]
        self._places = user_code.places
        self.follow_steps = any(hasattr(each, "on_step_end") for _, each in self._all)

    def call(
        self,
        method: str,
        model: nn.Module,
        step: int,
        epoch: int,
        lr: float,
        metrics: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Call a method of all that have it. Raises OwnCodeError."""

        def copy_weights() -> dict[str, Tensor]:
            entries = model.state_dict().items()
            return {name: value.detach().cpu().clone() for name, value in entries}

        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        frozen = MappingProxyType(numbers)
        state = TrainingState(step, epoch, lr, frozen, copy_weights)
        for who, callback in self._all:
            if hasattr(callback, method):
                _call(f"`{method}` of {who}", getattr(callback, method), state)


def _made(reference: str, user_code: UserCode) -> tuple[str, Any]:
    """Return the name and the object of a callback; a class or function is called."""
    callback = user_code.find(reference, "callback")
    who = f"the callback `{reference}`"
    if reference.startswith(GIVEN):
        kind = callback if hasattr(callback, "__qualname__") else type(callback)
        who = f"the callback `{kind.__qualname__}`"
    if isinstance(callback, type) or not _methods(callback):
        with blaming(who):
            callback = callback()
    methods = _methods(callback)
    for method in methods:
        if method not in METHODS:
            raise OwnCodeError(
                f"A callback has methods {', '.join(METHODS)}; {who} has `{method}`."
                f"{did_you_mean(method, METHODS)}"
            )
    if not methods:
        raise OwnCodeError(
            f"A callback has at least one method of {', '.join(METHODS)}; "
            f"{who} has none."
        )
    return who, callback


def _methods(value: Any) -> list[str]:
    return [name for name in dir(value) if name.startswith("on_")]


def _call(
    who: str, method: Callable[[TrainingState], Any], state: TrainingState
) -> None:
    """Call a method. Raises OwnCodeError, also if it changes what decides bits."""
    before = _settings()
    with blaming(who), seeding.kept():
        try:
            method(state)
        except SystemExit as error:
            raise RuntimeError(f"it called `sys.exit({error.code!r})`") from error
    if _settings() != before:
        raise OwnCodeError(
            "A callback must not change the result, and so none of PyTorch's settings; "
            f"{who} changed its threads, default dtype, gradient mode, precision or "
            f"determinism from {before} to {_settings()}."
        )


def _settings() -> tuple[Any, ...]:
    """Return settings of this process that decide bits."""
    return (
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )
