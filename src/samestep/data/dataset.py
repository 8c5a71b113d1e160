"""A data source as the workers see it: tensors, gathered by index."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samestep.config.data import CustomData, DataRecipe, Task, TextData
from samestep.config.recipe import Recipe
from samestep.core.metric import Metric, all_metrics
from samestep.core.plan import derive_seed
from samestep.data.augment import NONE, Augmentation, Mixed
from samestep.data.pytree import Nested, Shape, shapes_from_json
from samestep.data.sources import source_of
from samestep.data.splits import Converted, First, Split
from samestep.data.targets import ALL_LABELS, Labels
from samestep.errors import RecipeError
from samestep.state import dtypes
from samestep.user_code import seeding
from samestep.user_code.references import UserCode


@dataclass(frozen=True)
class Dataset:
    """The splits `train`, `validation` and `test` of a source, and its task."""

    splits: dict[str, Split]
    """`validation` and `test` may be empty."""
    inputs: Shape
    """The shape of one sample: [channels, height, width], [values] or [tokens].

    Where a model takes several inputs, a dictionary or tuple of such shapes.
    """
    outputs: int
    """Classes, different tokens, or values to predict."""
    task: Task = "classification"
    targets_per_sample: int = 1
    own_metrics: tuple[Metric, ...] = ()
    """What a loss function of the user's own measures; COUNTED: also a built-in one."""
    augmentation: Augmentation = NONE
    """Of training samples, in training only."""

    def draw(self, samples: Tensor, epoch: int) -> tuple[Nested, Tensor | Mixed]:
        """A micro-batch to train on: int64 [b] -> inputs [b, ...] and targets.

        A pure function, but for what a data set of the user's own draws from torch's
        default generator. `epoch` counts from 0.
        """
        inputs, targets = self.splits["train"].gather(samples)
        return self.augmentation.apply(inputs, targets, samples, epoch)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample, for a built-in model. RecipeError if there are several."""
        shape: tuple[int, ...] = self.inputs
        if isinstance(shape, tuple) and all(isinstance(size, int) for size in shape):
            return shape
        raise RecipeError(
            "A built-in family takes one input; a sample of these data has several, "
            f"{self.inputs}. Give a model of your own."
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured besides the loss."""
        return all_metrics(self.own_metrics, self.task)

    @property
    def tokens_per_sample(self) -> int | None:
        """Targets of each sample, if they are tokens."""
        return self.targets_per_sample if self.task == "next-token" else None

    @property
    def facts(self) -> dict[str, Any]:
        """What a model is built for."""
        return {"inputs": self.inputs, "outputs": self.outputs, "task": self.task}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Dataset":
        """To build a model again, without samples."""
        return cls(
            splits={},
            inputs=shapes_from_json(facts["inputs"]),
            outputs=facts["outputs"],
            task=facts["task"],
        )

    def first(self, samples: int) -> "Dataset":
        """With at most so many samples in each split."""
        parts: dict[str, Split] = {
            name: First(split, min(samples, len(split)))
            for name, split in self.splits.items()
        }
        return replace(self, splits=parts)


def load(
    recipe: DataRecipe,
    user_code: UserCode | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    labels: Labels = ALL_LABELS,
) -> Dataset:
    """Load a source; its floats become `dtype`.

    Random draws of the user's code and of the augmentation follow `seed`. Raises
    DataError, OwnCodeError.
    """
    if isinstance(recipe, CustomData):
        seeding.seed(derive_seed(seed, "data"))
    splits, info = source_of(recipe).load(user_code or UserCode(), labels)
    dataset = Dataset(
        splits={s: Converted(part, info.task, dtype) for s, part in splits.items()},
        inputs=info.inputs,
        outputs=info.outputs,
        task=info.task,
        targets_per_sample=info.targets_per_sample,
    )
    augment = None if isinstance(recipe, TextData) else recipe.augment
    if augment is None:
        return dataset
    sample, _ = dataset.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    return replace(dataset, augmentation=Augmentation.of(augment, seed, sample))


def of_recipe(recipe: Recipe, user_code: UserCode | None = None) -> Dataset:
    """Load the data of a recipe, as its precision and its loss take them.

    Raises DataError, OwnCodeError.
    """
    dtype, labels = dtypes.of(recipe.precision), Labels.of(recipe.loss)
    return load(recipe.data, user_code, recipe.seed, dtype, labels)
