"""A data source as the workers see it: tensors, gathered by index."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from samestep.config.data import (
    PADDING,
    CustomData,
    DataRecipe,
    FashionData,
    IdxData,
    ImageData,
    MnistData,
    NpyData,
    NpzData,
    TableData,
    Task,
    TextData,
)
from samestep.config.recipe import Recipe
from samestep.core.metric import Metric, all_metrics
from samestep.core.plan import derive_seed
from samestep.data import pytree
from samestep.data.augment import NONE, Augmentation, Mixed
from samestep.data.pytree import Nested, Shape, shapes_from_json
from samestep.data.sources import (
    idx,
    image_folder,
    mnist,
    npy,
    rows,
    text,
    user_dataset,
)
from samestep.data.splits import Split
from samestep.data.targets import ALL_LABELS, DataInfo, Labels
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


@dataclass(frozen=True)
class First:
    """The first samples of a split."""

    split: Split
    size: int

    def __len__(self) -> int:
        return self.size

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]; a pure function."""
        return self.split.gather(indices)


@dataclass(frozen=True)
class Images:
    """uint8 images [n, pixels] and labels [n], perhaps mapped from a file."""

    images: Tensor
    labels: Tensor
    shape: tuple[int, ...]
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> normalised float32 images [b, *shape] and int64 labels [b]."""
        pixels = self.images.index_select(0, indices).float()
        pixels.mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        labels = self.labels.index_select(0, indices).long()
        return pixels.view(-1, *self.shape), labels


@dataclass(frozen=True)
class Windows:
    """Windows of a text; what does not fill one is padded."""

    tokens: Tensor
    """int32 [n], of the whole text."""
    starts: Tensor
    """int64 [windows]"""
    lengths: Tensor
    """int64 [windows]: how many targets each of them has."""
    context: int
    is_padded: bool

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> int64 [b, context] and the same moved on by one.

        Behind the end of a sample inputs are 0, the first character of the vocabulary.
        """
        places = self.starts[indices].unsqueeze(1) + torch.arange(self.context + 1)
        if not self.is_padded:
            windows = self.tokens[places].long()
            return windows[:, :-1], windows[:, 1:]
        windows = self.tokens[places.clamp(max=len(self.tokens) - 1)].long()
        is_behind = torch.arange(self.context) >= self.lengths[indices].unsqueeze(1)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return inputs.masked_fill(is_behind, 0), targets.masked_fill(is_behind, PADDING)


@dataclass(frozen=True)
class Converted:
    """A split whose floats, and all values to predict, become those of one type."""

    split: Split
    task: Task
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.split)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]."""
        inputs, targets = self.split.gather(indices)
        inputs = pytree.apply(
            lambda values: (
                values.to(self.dtype) if values.is_floating_point() else values
            ),
            inputs,
        )
        if self.task == "regression":
            targets = targets.to(self.dtype)
        return inputs, targets


def load(
    recipe: DataRecipe,
    own: UserCode | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    labels: Labels = ALL_LABELS,
) -> Dataset:
    """Load a source; what `own` code and the augmentation draw follows `seed`.

    Its floats become `dtype`. Raises DataError, OwnCodeError.
    """
    if isinstance(recipe, CustomData):
        seeding.seed(derive_seed(seed, "data"))
    data = _load(recipe, own or UserCode(), dtype, labels)
    splits: dict[str, Split] = {
        name: Converted(split, data.task, dtype) for name, split in data.splits.items()
    }
    data = replace(data, splits=splits)
    augment = None if isinstance(recipe, TextData) else recipe.augment
    if augment is None:
        return data
    sample, _ = data.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    return replace(data, augmentation=Augmentation.of(augment, seed, sample))


def of_recipe(recipe: Recipe, own: UserCode | None = None) -> Dataset:
    """Load the data of a recipe, as its precision and its loss take them.

    Raises DataError, OwnCodeError.
    """
    dtype, labels = dtypes.of(recipe.precision), Labels.of(recipe.loss)
    return load(recipe.data, own, recipe.seed, dtype, labels)


def _load(
    recipe: DataRecipe, own: UserCode, dtype: torch.dtype, labels: Labels
) -> Dataset:
    match recipe:
        case MnistData():
            return _mnist(recipe)
        case TextData():
            return _text(recipe)
        case CustomData():
            return _of(user_dataset.load(recipe, own, labels))
        case IdxData() | FashionData():
            return _of(rows.build(recipe, idx.load(recipe), labels))
        case NpyData() | NpzData():
            return _of(rows.build(recipe, npy.load(recipe), labels))
        case ImageData():
            return _of(rows.build(recipe, image_folder.load(recipe), labels))
        case TableData():
            return _of(rows.build_table(recipe, dtype))


def _of(found: tuple[Mapping[str, Split], DataInfo]) -> Dataset:
    splits, facts = found
    return Dataset(
        *(dict(splits), facts.inputs, facts.outputs),
        *(facts.task, facts.targets_per_sample),
    )


def _mnist(recipe: MnistData) -> Dataset:
    shape = (1, 28, 28)
    splits: dict[str, Split] = {
        name: Images(
            torch.from_numpy(samples.images),
            torch.from_numpy(samples.labels),
            shape,
            mnist.MEAN,
            mnist.STD,
        )
        for name, samples in mnist.load(recipe).items()
    }
    return Dataset(splits, shape, mnist.NUM_CLASSES)


def _text(recipe: TextData) -> Dataset:
    found = text.load(recipe)
    tokens, starts, lengths = map(
        torch.from_numpy, (found.tokens, found.starts, found.lengths)
    )
    splits: dict[str, Split] = {
        name: Windows(
            *(tokens, starts[first:end], lengths[first:end]),
            *(recipe.context, recipe.lines),
        )
        for name, (first, end) in found.windows.items()
    }
    return Dataset(
        splits,
        (recipe.context,),
        len(found.vocabulary),
        task="next-token",
        targets_per_sample=recipe.context,
    )
