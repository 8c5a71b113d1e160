"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682).

Gradients are taken at `y`, between the weights `z` that steps move and their average
`x`, which is the result. With the gradient `g` at `y` and its running square `v`, step
t (Algorithm 1 of the paper) is

    v = beta2 * v + (1 - beta2) * g^2
    z = z - lr * (g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * y)
    x = x + c * (z - x)                         c = lr_t^2 / (lr_1^2 + ... + lr_t^2)
    y = z + beta1 * (x - z)

All three begin as the initial weights.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from samestep.config.optimizer import ScheduleFreeAdamWRecipe
from samestep.optim.step import Step
from samestep.state.layout import AVERAGE


STATES = ("z", "exp_avg_sq", AVERAGE)


def update(
    recipe: ScheduleFreeAdamWRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update the weights `y` and the states in place; all tensors [n]."""
    z, square, x = states
    beta1, beta2 = recipe.betas
    if step.number == 1:
        z.copy_(weights)
        x.copy_(weights)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_(math.sqrt(1 - beta2**step.number)).add_(recipe.eps)
    z.addcdiv_(gradient, root, value=-step.lr)
    z.add_(weights, alpha=-step.lr * step.weight_decay)
    x.lerp_(z, step.share)
    weights.copy_(z).lerp_(x, beta1)
