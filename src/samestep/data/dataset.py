"""A loaded data source: tensors, gathered by the numbers of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samestep.config import data as section
from samestep.config.data import DataRecipe
from samestep.config.recipe import Recipe
from samestep.core.metric import Metric, all_metrics
from samestep.core.plan import derive_seed
from samestep.data.augment import NONE, Augmentation, Mixed
from samestep.data.pytree import Nested, shapes_from_json
from samestep.data.sources import rows, source_of, user_dataset
from samestep.data.sources.source import SPLITS, ArraySource
from samestep.data.splits import Converted, Loaded, Part, Split
from samestep.data.targets import ALL_LABELS, DataInfo, Labels
from samestep.errors import RecipeError
from samestep.state import dtypes
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding
from samestep.user_code.references import UserCode


@dataclass(frozen=True)
class Dataset(DataInfo):
    """The splits `train`, `validation` and `test` of a source, and its task."""

    splits: dict[str, Split] = field(default_factory=dict)
    """`validation` and `test` may be empty."""
    own_metrics: tuple[Metric, ...] = ()
    """Metrics of the user's loss function; COUNTED: also of a built-in one."""
    augmentation: Augmentation = NONE
    """Changes of training samples, in training only."""

    def draw(
        self, samples: Tensor, epoch: int, read: tuple[int, list[Any]] | None = None
    ) -> tuple[Nested, Tensor | Mixed]:
        """Return inputs [b, ...] and targets of the samples int64 [b], to train on.

        `epoch` counts from 0. With a stream, `read` is the number of a sample and what
        was read from there on. A pure function, except that the user's data sets may
        draw from torch's default generator.
        """
        split, first = self.splits["train"], 0
        if read is not None:
            first, split = read[0], user_dataset.with_samples(split, read[1])
        inputs, targets = split.gather(samples - first)
        return self.augmentation.apply(inputs, targets, samples, epoch)

    @property
    def has_one_input(self) -> bool:
        """Whether a sample has one input, rather than several."""
        shape = self.inputs
        return isinstance(shape, tuple) and all(isinstance(n, int) for n in shape)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of a sample's only input. Raises RecipeError if it has several."""
        if self.has_one_input:
            shape: tuple[int, ...] = self.inputs
            return shape
        raise RecipeError(
            "A built-in family takes one input; a sample of these data has several, "
            f"{self.inputs}. Use your own model."
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics besides the loss."""
        return all_metrics(self.own_metrics, self.task)

    @property
    def tokens_per_sample(self) -> int | None:
        """The number of targets of a sample, if they are tokens."""
        return self.targets_per_sample if self.task == "next-token" else None

    @property
    def facts(self) -> JsonObject:
        """The properties that a model is built for, as stored in result.json."""
        return {"inputs": self.inputs, "outputs": self.outputs, "task": self.task}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Dataset":
        """Return a data set without samples, to build its model again."""
        inputs = shapes_from_json(facts["inputs"])
        return cls(inputs, facts["outputs"], facts["task"])

    def first(self, samples: int, names: Sequence[str] = SPLITS) -> "Dataset":
        """Return the data set with at most this many samples in the named splits."""
        parts: dict[str, Split] = {}
        for name in names:
            split = self.splits[name]
            parts[name] = Part(split, torch.arange(min(samples, len(split))))
        return replace(self, splits={**self.splits, **parts})


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
    if isinstance(recipe, section.CustomData):
        seeding.seed(derive_seed(seed, "data"))
    splits, info = _loaded(recipe, user_code or UserCode(), labels, seed)
    converted = {s: Converted(part, info.task, dtype) for s, part in splits.items()}
    dataset = Dataset(**vars(info), splits=dict(converted))
    augment = None if isinstance(recipe, section.TextData) else recipe.augment
    if augment is None:
        return dataset
    sample, _ = dataset.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    return replace(dataset, augmentation=Augmentation.of(augment, seed, sample))


def _loaded(
    recipe: DataRecipe, user_code: UserCode, labels: Labels, seed: int
) -> Loaded:
    match recipe:
        case section.CustomData():
            return user_dataset.load(recipe, user_code, labels, seed)
        case section.MnistData():
            return rows.mnist_images(recipe)
        case section.TableData():
            return rows.table_rows(recipe)
        case section.TextData():
            return rows.text_windows(recipe)
    source = source_of(recipe)
    assert isinstance(source, ArraySource)
    return rows.array_rows(source, labels)


def of_recipe(recipe: Recipe, user_code: UserCode | None = None) -> Dataset:
    """Load the data of a recipe, as its precision and its loss take them.

    Raises DataError, OwnCodeError.
    """
    dtype, labels = dtypes.of(recipe.precision), Labels.of(recipe.loss)
    return load(recipe.data, user_code, recipe.seed, dtype, labels)
