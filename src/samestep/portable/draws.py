"""Random numbers from counters: element `e` depends on the key and on `e` alone."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.core import splitmix
from samestep.portable import functions


Arguments = Mapping[str, Any]
"""The arguments of an ATen operation, by their names."""


class Numbers(Protocol):
    """Where random numbers come from: float32 [size], multiples of 2**-24."""

    def first(self, size: int) -> NDArray[np.float32]:
        """Return numbers in [0, 1), for operations that draw once or twice."""

    def second(self, size: int) -> NDArray[np.float32]:
        """Return others, for operations that draw twice."""


@dataclass(frozen=True)
class OfKey:
    """Numbers of the key of an operation, before the first step."""

    key: int

    def first(self, size: int) -> NDArray[np.float32]:
        """Return the upper bits."""
        return splitmix.uniform(self.key, size)

    def second(self, size: int) -> NDArray[np.float32]:
        """Return those below."""
        bits = splitmix.numbers(self.key, size) >> np.uint64(16) & np.uint64(0xFFFFFF)
        return bits.astype(np.float32) * np.float32(2**-24)


def _uniform(numbers: Numbers, tensor: Tensor, arguments: Arguments) -> Tensor:
    low: float = arguments.get("from", 0.0)
    high: float = arguments.get("to", 1.0)
    return _uniform_numbers(numbers, tensor) * (high - low) + low


def _normal(numbers: Numbers, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Draw float32 [n], by the transform of Box and Muller (1958)."""
    size = tensor.numel()
    logarithm = functions.compute("log", _positive(numbers, size))
    angle = torch.from_numpy(numbers.second(size) * np.float32(2 * math.pi))
    radius = functions.sqrt(logarithm * -2)
    normal = (radius * functions.compute("cos", angle)).view(tensor.shape)
    deviation: float | Tensor = arguments.get("std", 1.0)
    mean: float | Tensor = arguments.get("mean", 0.0)
    return normal * deviation + mean


def _exponential(numbers: Numbers, tensor: Tensor, arguments: Arguments) -> Tensor:
    logarithm = functions.compute("log", _positive(numbers, tensor.numel()))
    rate: float = arguments["lambd"]
    return -logarithm.view(tensor.shape) / rate


def _bernoulli(numbers: Numbers, tensor: Tensor, arguments: Arguments) -> Tensor:
    probability: float | Tensor | None = arguments.get("p")
    if probability is None:  # the tensor that the operation was given
        probability = arguments["self"].float()
    return (_uniform_numbers(numbers, tensor) < probability).float()


def _integers(numbers: OfKey, tensor: Tensor, arguments: Arguments) -> Tensor:
    """Draw int64 [n]; by default all numbers that the type has from 0 on."""
    low: int = arguments.get("low", arguments.get("from")) or 0
    high = arguments.get("high", arguments.get("to"))
    if high is None:
        is_float = tensor.is_floating_point()
        high = 2**24 + 1 if is_float else torch.iinfo(tensor.dtype).max
    span = np.uint64(int(high) - int(low))
    bits = splitmix.numbers(numbers.key, tensor.numel()) % span
    return torch.from_numpy(bits.astype(np.int64)).view(tensor.shape) + low


def _permutation(numbers: OfKey, tensor: Tensor, arguments: Arguments) -> Tensor:
    return torch.from_numpy(splitmix.permutation(numbers.key, tensor.numel()))


def _uniform_numbers(numbers: Numbers, tensor: Tensor) -> Tensor:
    return torch.from_numpy(numbers.first(tensor.numel())).view(tensor.shape)


def _positive(numbers: Numbers, size: int) -> Tensor:
    """Return float32 [n] in (0, 1], multiples of 2**-24."""
    return torch.from_numpy(numbers.first(size) + np.float32(2**-24))


FRACTIONS: Mapping[str, Callable[[Numbers, Tensor, Arguments], Tensor]] = {
    "bernoulli": _bernoulli,
    "exponential": _exponential,
    "normal": _normal,
    "rand": _uniform,
    "rand_like": _uniform,
    "randn": _normal,
    "randn_like": _normal,
    "uniform": _uniform,
}
"""By the name of an ATen operation, what draws numbers for a tensor of its shape."""
DRAWS: Mapping[str, Callable[[OfKey, Tensor, Arguments], Tensor]] = {
    **FRACTIONS,
    "randint": _integers,
    "randint_like": _integers,
    "random": _integers,
    "randperm": _permutation,
}
"""The same, with operations that need whole numbers of more bits."""
