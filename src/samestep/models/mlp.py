"""A multi-layer perceptron.

[b, 1, 28, 28] -> [b, 784] -> linear -> (batch norm) -> ReLU -> dropout -> ...
               -> linear -> [b, 10]
"""

import math

from torch import Tensor, nn

from samestep.config.model import MlpModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Layers, Linear


class Mlp(nn.Module):
    """Xavier-uniform weights and zero biases, drawn from torch's default generator."""

    def __init__(self, recipe: MlpModel, data: Dataset) -> None:
        super().__init__()
        widths = math.prod(data.input_shape), *recipe.hidden, data.outputs
        self.layers = Layers(widths, recipe.dropout, _linear)
        has_norms = recipe.norm == "batch"
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(width) for width in (recipe.hidden if has_norms else ())
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits [b, outputs] of inputs [b, ...]."""
        logits: Tensor = self.layers(inputs.flatten(1), self.norms)
        return logits


def _linear(inputs: int, outputs: int) -> Linear:
    linear = Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
