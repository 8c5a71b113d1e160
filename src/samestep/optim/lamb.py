"""LAMB: Adam with a trust ratio for each parameter (You et al. 2020, arXiv:1904.00962).

Algorithm 2, with the gradient `g` and its running mean `m` and square `v` of step t:

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
    w = w - lr * |w| / |r| * r

The norms are those of one parameter tensor. Where one is zero, as at biases that begin
with zeros, the ratio is 1.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from samestep.config.optimizer import LambRecipe
from samestep.optim.step import Step


def update(
    recipe: LambRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update a whole parameter and its states in place; all tensors have its shape."""
    mean, square = states
    beta1, beta2 = recipe.betas
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_(math.sqrt(1 - beta2**step.number)).add_(recipe.eps)
    direction = (mean / (1 - beta1**step.number)).div_(root)
    direction.add_(weights, alpha=step.weight_decay)
    norm, length = weights.norm().item(), direction.norm().item()
    ratio = norm / length if norm and length else 1.0
    weights.add_(direction, alpha=-step.lr * ratio)
