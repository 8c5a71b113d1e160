"""One data set, divided into splits."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from samestep.config.data import Divided
from samestep.data.pytree import Nested
from samestep.errors import DataError


class Split(Protocol):
    """Samples with numbers from 0 on."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]; a pure function."""
        ...


@dataclass(frozen=True)
class Part:
    """Some of the samples of another split."""

    whole: Split
    members: Tensor

    def __len__(self) -> int:
        return len(self.members)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]."""
        return self.whole.gather(self.members[indices])


def divide(
    size: int, recipe: Divided, who: str, held_out: tuple[str, ...]
) -> dict[str, Tensor]:
    """The sample numbers of `train` and of what is held out, each in their order.

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
