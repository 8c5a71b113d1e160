"""Lion: steps of one size in every direction (Chen et al. 2023, arXiv:2302.06675).

Algorithm 2, with the gradient `g` and its running mean `m`:

    u = sign(beta1 * m + (1 - beta1) * g)
    w = w * (1 - lr * weight_decay) - lr * u
    m = beta2 * m + (1 - beta2) * g
"""

from collections.abc import Sequence

from torch import Tensor

from samestep.config.optimizer import LionRecipe
from samestep.optim.step import Step


def update(
    recipe: LionRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update weights and states in place; all tensors [n]."""
    (mean,) = states
    beta1, beta2 = recipe.betas
    direction = gradient.lerp(mean, beta1).sign_()
    weights.mul_(1 - step.lr * step.weight_decay)
    weights.add_(direction, alpha=-step.lr)
    mean.lerp_(gradient, 1 - beta2)
