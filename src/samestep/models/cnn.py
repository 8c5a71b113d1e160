"""A convolutional network.

[b, c, h, w] -> (conv k x k -> max-pool 2 -> (batch norm) -> ReLU) for each stage
             -> flatten -> (linear -> ReLU -> dropout) for each hidden layer
             -> linear -> [b, classes]

Pooling before ReLU gives the same values and has a quarter of the work for it.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.config.model import CnnModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Conv2d, Layers


class Cnn(nn.Module):
    """torch's default initialisation, from its default generator."""

    def __init__(self, recipe: CnnModel, data: Dataset) -> None:
        super().__init__()
        channels, *_ = data.input_shape
        self.stages = nn.ModuleList(
            Conv2d(*ends, kernel)
            for ends, kernel in zip(
                pairwise([channels, *recipe.channels]), recipe.kernels, strict=True
            )
        )
        has_norms = recipe.norm == "batch"
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(width) for width in (recipe.channels if has_norms else ())
        )
        with torch.no_grad():  # in evaluation mode: zeros are no statistics
            self.eval()
            features = self._convolve(torch.zeros(1, *data.input_shape)).shape[1]
            self.train()
        self.layers = Layers([features, *recipe.hidden, data.outputs], recipe.dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [b, classes] of images [b, c, h, w]."""
        logits: Tensor = self.layers(self._convolve(images))
        return logits

    def _convolve(self, images: Tensor) -> Tensor:
        """Compute features [b, n] of images [b, c, h, w]."""
        for index, stage in enumerate(self.stages):
            images = functional.max_pool2d(stage(images), 2)
            if self.norms:
                images = self.norms[index](images)
            images = functional.relu(images)
        return images.flatten(1)
