"""Tensors in dictionaries and tuples: the inputs of models that take several.

`torch.utils._pytree` could do the same, and is private.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn


Nested: TypeAlias = Any
"""A tensor, or a dictionary or a tuple of these.

(With a recursive union, every use of the usual single tensor would need an assertion.)
"""
Shape: TypeAlias = Any
"""The shape of one sample: a tuple of numbers, or a dictionary or a tuple of these."""


def apply(function: Callable[[Tensor], Any], value: Nested) -> Any:
    """Return the same dictionaries and tuples, with `function` of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: apply(function, each) for key, each in value.items()}
    return tuple(apply(function, each) for each in value)


def leaves(value: Nested, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor after its place in `value`: `["mask"]`, `[0]["mask"]`."""
    if isinstance(value, Tensor):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, each in items:
        yield from leaves(each, f"{name}[{json.dumps(key)}]")


def restore(structure: Any, tensors: Iterator[Tensor]) -> Nested:
    """Put the tensors of `leaves` back into a structure, which may be from JSON.

    `structure` is what `apply` made with any function that returns none.
    """
    if isinstance(structure, dict):
        return {key: restore(each, tensors) for key, each in structure.items()}
    if isinstance(structure, list | tuple):
        return tuple(restore(each, tensors) for each in structure)
    return next(tensors)


def call(model: nn.Module, inputs: Nested) -> Any:
    """Call the model: a dictionary gives keyword arguments, a tuple positional ones."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def shapes(inputs: Nested) -> Any:
    """Return the shape of one sample for each tensor [b, ...] of `inputs`."""
    return apply(lambda tensor: tuple(tensor.shape[1:]), inputs)


def shapes_from_json(shape: Any) -> Any:
    """Return what `shapes` had returned before it went through JSON."""
    if isinstance(shape, dict):
        return {key: shapes_from_json(each) for key, each in shape.items()}
    if isinstance(shape, list | tuple):
        return tuple(shapes_from_json(each) for each in shape)
    return shape


def describe(inputs: Nested) -> str:
    """Return shapes and types for a message: `[2, 5] (torch.float32)`."""
    parts = [
        f"{name} {list(tensor.shape)} ({tensor.dtype})".lstrip()
        for name, tensor in leaves(inputs)
    ]
    return ", ".join(parts)
