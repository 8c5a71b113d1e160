"""A multi-layer perceptron.

[b, 784] -> linear -> (batch norm) -> ReLU -> dropout -> ... -> linear -> [b, 10]
"""

from torch import nn

from samestep.models.layers import Linear, ReluDropout
from samestep.recipe import MlpModel


def build(recipe: MlpModel, inputs: int, outputs: int) -> nn.Sequential:
    """Xavier-uniform weights and zero biases, drawn from torch's default generator."""
    layers: list[nn.Module] = []
    width = inputs
    for hidden in recipe.hidden:
        layers.append(_linear(width, hidden))
        if recipe.norm == "batch":
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(ReluDropout(recipe.dropout))
        width = hidden
    return nn.Sequential(*layers, _linear(width, outputs))


def _linear(inputs: int, outputs: int) -> Linear:
    linear = Linear(inputs, outputs)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
