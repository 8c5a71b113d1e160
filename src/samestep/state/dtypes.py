"""The floating-point type of all that a training holds, and of what it computes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from samestep.config.recipe import Precision
from samestep.state.layout import Dtype


NAMES: dict[torch.dtype, Dtype] = {torch.float32: "float32", torch.float64: "float64"}
OF = {"float32": torch.float32, "bf16": torch.float32, "float64": torch.float64}
"""By the recipe's `precision`."""


def of(precision: Precision) -> torch.dtype:
    """Return the type of parameters, gradients, optimizer states, buffers and data."""
    return OF[precision]


def converted(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the same module; for float64, convert its floating-point tensors."""
    return model.double() if dtype is torch.float64 else model


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """Make torch's new tensors float64 inside, where that is the type.

    So `torch.zeros(n)` in a model's `forward` or in a loss fits its other tensors.
    """
    if dtype is not torch.float64:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
