"""A multi-layer perceptron.

[b, 784] -> linear -> ReLU -> dropout -> ... -> linear -> [b, 10]
"""

from itertools import pairwise

from torch import nn

from samestep.recipe import MlpModel


def build(recipe: MlpModel, inputs: int, outputs: int) -> nn.Sequential:
    """Xavier-uniform weights and zero biases, drawn from torch's default generator."""
    widths = (inputs, *recipe.hidden, outputs)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU(), nn.Dropout(recipe.dropout)]
    return nn.Sequential(*layers[:-2])
