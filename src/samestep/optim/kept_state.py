"""What a custom optimizer keeps between two steps, as state vectors and as numbers.

A tensor of a parameter's state fills the parameter's room in a state vector of its
name, from the beginning. A tensor that is larger than its parameter goes on in further
vectors: `name#1`, `name#2`. Tensors [] and Python's numbers go to the progress.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samestep.errors import OwnCodeError
from samestep.state.layout import AVERAGE, BEST, Entry, Layout
from samestep.system.json_values import JsonObject


EXACT_IN = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
"""The types whose values a vector of a type can hold."""
MOST_NUMBERS = 1_500
"""How many numbers, of any length, the progress has room for."""


@dataclass(frozen=True)
class Kept:
    """What is kept for one parameter under one name."""

    shape: tuple[int, ...] = ()
    """The shape of a tensor; one of shape [] is kept as a number."""
    dtype: torch.dtype | None = None
    """None: a Python value."""


Kinds = Sequence[Mapping[str, Kept]]
"""For each parameter, what is kept, by name."""


def kind_of(value: Any, name: str, who: str, dtype: torch.dtype) -> Kept:
    """Return how to keep a value in vectors of `dtype`. Raises OwnCodeError."""
    if value is None or isinstance(value, bool | int | float):
        return Kept()
    if isinstance(value, Tensor):
        is_number = value.dim() == 0
        if is_number or value.dtype in EXACT_IN[dtype]:
            return Kept(tuple(value.shape), value.dtype)
    shown = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise OwnCodeError(
        "The state of an optimizer is saved as floating-point tensors, at most as wide "
        f"as the parameters, and as numbers; `{name}` in the state of {who} is "
        f"{shown}. Keep it as such."
    )


def vector_names(kinds: Kinds, layout: Layout, who: str) -> tuple[str, ...]:
    """Return the names of the state vectors. Raises OwnCodeError."""
    names = dict[str, None]()
    for entry, kept in zip(layout.parameters, kinds, strict=True):
        for name, kind in kept.items():
            size = Entry(name=name, shape=kind.shape).numel if kind.shape else 0
            for index in range(-(-size // max(1, entry.numel))):
                names[_vector(name, index)] = None
    if {AVERAGE, BEST} & names.keys():
        raise OwnCodeError(
            f"A state vector `{AVERAGE}` or `{BEST}` holds weights that samestep "
            f"averages; {who} uses one of these names. Use another."
        )
    numbers = sum(not kind.shape for kept in kinds for kind in kept.values())
    if numbers > MOST_NUMBERS:
        raise OwnCodeError(
            f"An optimizer keeps at most {MOST_NUMBERS:,} numbers besides tensors; "
            f"{who} keeps {numbers:,}. Keep them in the param groups, or as tensors of "
            "the parameters' shapes."
        )
    return tuple(names)


def _vector(name: str, index: int) -> str:
    return f"{name}#{index}" if index else name


def rooms(
    vectors: Mapping[str, Tensor], name: str, part: slice, values: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the places of a tensor [n], and the values that belong there.

    `part` is the room of its parameter in each of the `vectors`.
    """
    for index, chunk in enumerate(torch.split(values, max(1, part.stop - part.start))):
        if len(chunk):
            room = vectors[_vector(name, index)][part]
            yield room[: len(chunk)], chunk


def number(value: Any) -> Any:
    """Return a Python value, also of a tensor []."""
    return value.item() if isinstance(value, Tensor) else value


def group_numbers(param_groups: Sequence[Mapping[str, Any]]) -> list[JsonObject]:
    """Return the numbers in param groups, but for the learning rate."""
    return [
        {
            name: number(value)
            for name, value in group.items()
            if name != "lr" and _is_number(value)
        }
        for group in param_groups
    ]


def set_group_numbers(
    param_groups: Sequence[dict[str, Any]], saved: Sequence[JsonObject]
) -> None:
    """Restore what `group_numbers` returned."""
    for group, numbers in zip(param_groups, saved, strict=True):
        for name, value in numbers.items():
            before = group.get(name)
            group[name] = (
                torch.tensor(value, dtype=before.dtype, device=before.device)
                if isinstance(before, Tensor)
                else value
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, bool | int | float)
