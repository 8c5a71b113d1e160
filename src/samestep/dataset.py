"""A data source as the workers see it: tensors, gathered by index."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from samestep.data import custom, mnist, text
from samestep.ingredients import CustomData, DataRecipe, MnistData, TextData
from samestep.objective import METRICS, Metric, Task
from samestep.own import OwnCode


class Split(Protocol):
    """Samples with numbers from 0 on."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]; a pure function."""
        ...


@dataclass(frozen=True)
class Dataset:
    """The splits `train`, `validation` and `test` of a source, and its task."""

    splits: dict[str, Split]
    """`validation` and `test` may be empty."""
    inputs: tuple[int, ...]
    """The shape of one sample: [channels, height, width], [values] or [tokens]."""
    outputs: int
    """Classes, different tokens, or values to predict."""
    task: Task = "classification"
    targets_per_sample: int = 1
    own_metrics: tuple[Metric, ...] = ()
    """What a loss function of the user's own measures."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What is measured besides the loss."""
        return self.own_metrics or (Metric(METRICS[self.task]),)

    @property
    def facts(self) -> dict[str, Any]:
        """What a model is built for."""
        return {"inputs": self.inputs, "outputs": self.outputs, "task": self.task}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Dataset":
        """To build a model again, without samples."""
        return cls({}, tuple(facts["inputs"]), facts["outputs"], facts["task"])

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

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
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
    """Neighbouring windows of a text."""

    tokens: Tensor
    """int32 [n], of the whole text."""
    first: int
    """The number of the first window."""
    count: int
    context: int

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> int64 [b, context] and the same moved on by one."""
        starts = (indices + self.first) * self.context
        places = starts.unsqueeze(1) + torch.arange(self.context + 1)
        windows = self.tokens[places].long()
        return windows[:, :-1], windows[:, 1:]


def load(recipe: DataRecipe, own: OwnCode | None = None) -> Dataset:
    """`own` finds the user's functions. Raises DataError, OwnCodeError."""
    match recipe:
        case MnistData():
            return _mnist(recipe)
        case TextData():
            return _text(recipe)
        case CustomData():
            return _custom(recipe, own or OwnCode())


def _custom(recipe: CustomData, own: OwnCode) -> Dataset:
    found, facts = custom.load(recipe, own)
    splits: dict[str, Split] = dict(found)
    return Dataset(
        splits, facts.inputs, facts.outputs, facts.task, facts.targets_per_sample
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
    tokens = torch.from_numpy(found.tokens)
    splits: dict[str, Split] = {
        name: Windows(tokens, first, end - first, recipe.context)
        for name, (first, end) in found.windows.items()
    }
    return Dataset(
        splits,
        (recipe.context,),
        len(found.vocabulary),
        task="next-token",
        targets_per_sample=recipe.context,
    )
