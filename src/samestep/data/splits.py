"""The splits of a data set: samples by number, and what can be made of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from samestep.config.data import Divided, Task
from samestep.data import pytree
from samestep.data.pytree import Nested
from samestep.data.targets import DataInfo
from samestep.errors import DataError


class Split(Protocol):
    """Samples with numbers from 0 on."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """Return the samples int64 [b]: inputs [b, ...] and targets [b, ...].

        A pure function of the indices.
        """
        ...


Loaded: TypeAlias = tuple[Mapping[str, Split], DataInfo]
"""The splits `train`, `validation` and `test`, and what they share."""


@dataclass(frozen=True)
class Part:
    """Some of the samples of another split."""

    whole: Split
    members: Tensor
    """int64 [n]: their numbers there."""

    def __len__(self) -> int:
        return len(self.members)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        return self.whole.gather(self.members[indices])


@dataclass(frozen=True)
class Converted:
    """A split whose floats, and all values to predict, become those of one type."""

    split: Split
    task: Task
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.split)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:

        def convert(values: Tensor) -> Tensor:
            return values.to(self.dtype) if values.is_floating_point() else values

        inputs, targets = self.split.gather(indices)
        if self.task == "regression":
            targets = targets.to(self.dtype)
        return pytree.apply(convert, inputs), targets


def divide(
    size: int, recipe: Divided, who: str, held_out: tuple[str, ...]
) -> dict[str, Tensor]:
    """Divide samples in `train` and what is held out; return their sorted numbers.

    In an order drawn from `split_seed`, the test comes first, then the validation.
    Raises DataError.
    """
    generator = torch.Generator().manual_seed(recipe.split_seed)
    order = torch.randperm(size, generator=generator)
    test = int(size * recipe.test) if "test" in held_out else 0
    validation = int(size * recipe.validation) if "validation" in held_out else 0
    left = size - test - validation
    if left < 1:
        raise DataError(
            f"{who} has {size} samples, of which `data.test` and `data.validation` "
            f"hold out {test} and {validation}: none is left to train on."
        )
    parts = torch.split(order, [test, validation, left])
    names = ("test", "validation", "train")
    return {n: part.sort().values for n, part in zip(names, parts, strict=True)}
