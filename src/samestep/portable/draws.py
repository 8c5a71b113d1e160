"""Random numbers from counters: element `e` depends on the key and on `e` alone."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.core import splitmix
from samestep.portable import functions


Arguments = Mapping[str, Any]
"""The arguments of an ATen operation, by their names."""


def _uniform(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    low: float = arguments.get("from", 0.0)
    high: float = arguments.get("to", 1.0)
    return _uniform_numbers(key, tensor) * (high - low) + low


def _normal(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Draw float32 [n], by the transform of Box and Muller (1958)."""
    bits = splitmix.numbers(key, tensor.numel())
    turn = (bits >> np.uint64(16) & np.uint64(0xFFFFFF)).astype(np.float32)
    angle = torch.from_numpy(turn * np.float32(2**-24) * np.float32(2 * math.pi))
    radius = (functions.compute("log", _positive(bits)) * -2).sqrt()
    numbers = (radius * functions.compute("cos", angle)).view(tensor.shape)
    deviation: float | Tensor = arguments.get("std", 1.0)
    mean: float | Tensor = arguments.get("mean", 0.0)
    return numbers * deviation + mean


def _exponential(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    bits = splitmix.numbers(key, tensor.numel())
    numbers = functions.compute("log", _positive(bits)).view(tensor.shape)
    rate: float = arguments["lambd"]
    return -numbers / rate


def _bernoulli(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    probability: float | Tensor | None = arguments.get("p")
    if probability is None:  # the tensor that the operation was given
        probability = arguments["self"].float()
    return (_uniform_numbers(key, tensor) < probability).float()


def _integers(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Draw int64 [n]; by default all numbers that the type has from 0 on."""
    low: int = arguments.get("low", arguments.get("from")) or 0
    high = arguments.get("high", arguments.get("to"))
    if high is None:
        is_float = tensor.is_floating_point()
        high = 2**24 + 1 if is_float else torch.iinfo(tensor.dtype).max
    span = np.uint64(int(high) - int(low))
    numbers = splitmix.numbers(key, tensor.numel()) % span
    return torch.from_numpy(numbers.astype(np.int64)).view(tensor.shape) + low


def _permutation(key: int, tensor: Tensor, arguments: Arguments) -> Tensor:
    return torch.from_numpy(splitmix.permutation(key, tensor.numel()))


def _uniform_numbers(key: int, tensor: Tensor) -> Tensor:
    numbers = splitmix.uniform(key, tensor.numel())
    return torch.from_numpy(numbers).view(tensor.shape)


def _positive(bits: splitmix.Numbers) -> Tensor:
    """Return float32 [n] in (0, 1], multiples of 2**-24."""
    high = (bits >> np.uint64(40)).astype(np.float32)
    return torch.from_numpy((high + np.float32(1)) * np.float32(2**-24))


DRAWS: Mapping[str, Callable[[int, Tensor, Arguments], Tensor]] = {
    "bernoulli": _bernoulli,
    "exponential": _exponential,
    "normal": _normal,
    "rand": _uniform,
    "rand_like": _uniform,
    "randint": _integers,
    "randint_like": _integers,
    "randn": _normal,
    "randn_like": _normal,
    "random": _integers,
    "randperm": _permutation,
    "uniform": _uniform,
}
"""By the name of an ATen operation, what draws the numbers for a tensor of its shape
from a key."""
