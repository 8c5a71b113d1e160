"""A multi-layer perceptron.

[b, 1, 28, 28] -> [b, 784] -> linear -> (batch norm) -> ReLU -> dropout -> ...
               -> linear -> [b, 10]
"""

import math
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from samestep.config.model import MlpModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Linear, dropout_masks


class Mlp(nn.Module):
    """Xavier-uniform weights and zero biases, drawn from torch's default generator."""

    def __init__(self, recipe: MlpModel, data: Dataset) -> None:
        super().__init__()
        inputs, outputs = math.prod(data.input_shape), data.outputs
        self._widths = list(recipe.hidden)
        self._dropout = recipe.dropout
        self.layers = nn.ModuleList(
            _linear(*ends) for ends in pairwise([inputs, *self._widths, outputs])
        )
        has_norms = recipe.norm == "batch"
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) for width in (self._widths if has_norms else [])
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits [b, outputs] of inputs [b, ...]."""
        inputs = inputs.flatten(1)
        masks: list[Tensor] | list[None] = [None] * len(self._widths)
        if self.training and self._dropout:
            masks = dropout_masks(
                self._dropout, len(inputs), self._widths, inputs.device
            )
        *hidden, last = self.layers
        for index, (layer, mask) in enumerate(zip(hidden, masks, strict=True)):
            assert isinstance(layer, Linear)
            if self.norms:
                inputs = functional.relu(self.norms[index](layer(inputs)))
                inputs = inputs if mask is None else inputs * mask
            else:
                inputs = layer.activate(inputs, mask)
        logits: Tensor = last(inputs)
        return logits


def _linear(inputs: int, outputs: int) -> Linear:
    linear = Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
