"""The plans of data that say themselves which samples make up each step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samestep.config.recipe import Recipe
from samestep.core.ownership import Share
from samestep.core.plan import Plan
from samestep.data.batches import batches_of_indices
from samestep.data.given import GivenData
from samestep.data.reader import StreamReader
from samestep.data.stream import digest_of, sketch
from samestep.errors import OwnCodeError


class _Epoch(NamedTuple):
    order: Tensor
    starts: list[int]
    """Where each global batch begins in the order, and where the last ends."""
    digest: str


@dataclass(frozen=True, kw_only=True)
class LoaderPlan(Plan):
    """The order of a DataLoader: that of the recipe, or that of its own sampler."""

    given: GivenData
    most_steps: int | None = None
    """Leave out later steps of each epoch."""
    _epochs: dict[int, _Epoch] = field(default_factory=dict, compare=False)
    """The first one, and the one asked for last."""

    @classmethod
    def of(cls, recipe: Recipe, given: GivenData, most_steps: int | None) -> Plan:
        """Return the plan of a recipe. Raises OwnCodeError, also for later epochs."""
        check_global_batch(recipe, given)
        plan = cls(
            0,
            recipe.global_batch,
            recipe.micro_batches,
            recipe.seed,
            recipe.is_portable,
            given=given,
            most_steps=most_steps,
        )
        return replace(plan, num_samples=plan._epoch(0).starts[-1])

    @property
    def steps_per_epoch(self) -> int:
        return len(self._epoch(0).starts) - 1

    def order(self, epoch: int) -> Tensor:
        return self._epoch(epoch).order

    def bounds(self, step: int) -> Share:
        epoch, index = self.place(step)
        starts = self._epoch(epoch).starts
        return starts[index], starts[index + 1]

    def digest(self, step: int) -> str:
        return self._epoch(self.place(step)[0]).digest

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            batches = batches_of_indices(self.given, self.seed, epoch, self.is_portable)
            batches = batches[: self.most_steps]
            self._check(batches, epoch)
            for old in self._epochs.keys() - {0}:
                del self._epochs[old]
            self._epochs[epoch] = _Epoch(
                torch.tensor(list(chain.from_iterable(batches)), dtype=torch.int64),
                [0, *accumulate(map(len, batches))],
                digest_of(batches) if self.given.is_ordered_by_others else "",
            )
        return self._epochs[epoch]

    def _check(self, batches: Sequence[Sequence[int]], epoch: int) -> None:
        count = len(self._epochs[0].starts) - 1 if 0 in self._epochs else len(batches)
        largest = max(map(len, batches), default=0)
        if not largest or not all(map(len, batches)):
            raise OwnCodeError(
                "Each global batch of a DataLoader has samples, and one "
                f"of epoch {epoch} has none."
            )
        if len(batches) != count:
            raise OwnCodeError(
                "All epochs have as many global batches; the batch sampler of this "
                f"DataLoader has {count} in epoch 0 and {len(batches)} in epoch "
                f"{epoch}."
            )
        if largest > self.global_batch:
            raise OwnCodeError(
                "With a batch sampler, the recipe's global batch is the largest one: "
                f"{self.global_batch}; a batch of epoch {epoch} has {largest} samples. "
                f"Set `global_batch = {largest}` or more."
            )


@dataclass(frozen=True, kw_only=True)
class StreamPlan(Plan):
    """The global batches of a stream, which are known as they are read."""

    reader: StreamReader
    head: list[Any]
    """Its first samples."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        given: GivenData,
        head: list[Any],
        most_steps: int | None = None,
    ) -> "StreamPlan":
        """Return the plan of a recipe. Raises OwnCodeError, also for later steps."""
        check_global_batch(recipe, given)
        given = replace(given, global_batch=recipe.global_batch)
        return cls(
            0,
            recipe.global_batch,
            recipe.micro_batches,
            recipe.seed,
            recipe.is_portable,
            reader=StreamReader(given, recipe.seed, most_steps),
            head=head,
        )

    @property
    def steps_per_epoch(self) -> int:
        return 0

    def place(self, step: int) -> tuple[int, int]:
        position = self.reader.at(step).position
        return position.epoch, step - position.first_step

    def samples(self, step: int) -> list[Any]:
        """Return the samples of a global batch. Raises OwnCodeError."""
        samples = self.reader.at(step).samples
        assert samples is not None  # a worker with a helper does not draw itself
        if step == 0 and not _begin_alike(samples, self.head):
            raise OwnCodeError(
                "A stream gives the same samples whenever it is read from its start, "
                "and this one gave others the second time. Let it begin anew in "
                "`__iter__`, and draw from torch's, Python's or NumPy's own generators."
            )
        return samples

    def bounds(self, step: int) -> Share:
        first = self.place(step)[1] * self.global_batch
        return first, first + self.reader.at(step).size

    def digest(self, step: int) -> str:
        return self.reader.at(step).sketch


def _begin_alike(samples: list[Any], others: list[Any]) -> bool:
    count = min(len(samples), len(others))
    return sketch(samples[:count]) == sketch(others[:count])


def check_global_batch(recipe: Recipe, given: GivenData) -> None:
    """Raise OwnCodeError if a DataLoader has another global batch than the recipe."""
    size = given.global_batch
    if size is not None and size != recipe.global_batch:
        raise OwnCodeError(
            f"The `batch_size` of the DataLoader is the global batch: it is {size}, "
            f"and the recipe's `global_batch` is {recipe.global_batch}. Give both the "
            f"same, such as `--global-batch {size}`."
        )
