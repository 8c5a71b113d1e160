"""Initial weights that are drawn from counters: the same on every processor."""

import math

import numpy as np
import torch
from torch import nn

from samestep.core import splitmix
from samestep.core.plan import derive_seed


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw the matrices of a multi-layer perceptron again, in place.

    Xavier-uniform (Glorot and Bengio 2010), as `models.mlp` draws them from torch's
    generator; biases are zero and norms one already.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            key = derive_seed(seed, "weights", name)
            outputs, inputs = parameter.shape
            bound = np.float32(math.sqrt(6 / (inputs + outputs)))
            uniform = splitmix.uniform(key, parameter.numel())
            values = (np.float32(2) * uniform - np.float32(1)) * bound
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(values).view_as(parameter))
