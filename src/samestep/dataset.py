"""A data source as the workers see it: tensors, gathered by index."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.data import mnist
from samestep.recipe import MnistData


@dataclass(frozen=True)
class Split:
    """uint8 images [n, pixels] and uint8 labels [n], mapped from the cache."""

    images: Tensor
    labels: Tensor
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> normalised float32 images [b, pixels] and int64 labels [b]."""
        pixels = self.images.index_select(0, indices).float()
        pixels.mul_(1 / (255 * self.std)).sub_(self.mean / self.std)
        return pixels, self.labels.index_select(0, indices).long()


@dataclass(frozen=True)
class Dataset:
    """The splits of a source and the shape of its task."""

    splits: dict[str, Split]
    num_inputs: int
    num_classes: int


def load(recipe: MnistData) -> Dataset:
    """Raises DataError."""
    splits = {
        name: Split(
            torch.from_numpy(samples.images),
            torch.from_numpy(samples.labels),
            mnist.MEAN,
            mnist.STD,
        )
        for name, samples in mnist.load(recipe).items()
    }
    return Dataset(splits, mnist.NUM_PIXELS, mnist.NUM_CLASSES)
