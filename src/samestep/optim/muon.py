"""Muon: update a matrix by its orthogonalised momentum (Jordan 2024).

With the gradient `g`, momentum `b` and weights `w` of a matrix [m, n]:

    b = momentum * b + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * b       with Nesterov, otherwise b
    o = 5 steps of Newton-Schulz on u, in bfloat16: near the orthogonal factor of u
    w = w * (1 - lr * weight_decay) - lr * scale * o

`scale` is sqrt(max(1, m / n)), or with `match_rms_adamw` 0.2 * sqrt(max(m, n)), which
suits the learning rates of AdamW (Liu et al. 2025, arXiv:2502.16982). The arithmetic is
that of `torch.optim.Muon`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.config.optimizer import MuonRecipe
from samestep.optim.step import Step


COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7


def update(
    recipe: MuonRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update a matrix and its momentum, the first state, in place; all [m, n]."""
    momentum = states[0]
    momentum.lerp_(gradient, 1 - recipe.momentum)
    direction = (
        gradient.lerp(momentum, recipe.momentum) if recipe.nesterov else momentum
    )
    direction = orthogonal(direction, recipe.ns_steps)
    weights.mul_(1 - step.lr * step.weight_decay)
    weights.add_(direction, alpha=-step.lr * scale(recipe, weights.shape))


def scale(recipe: MuonRecipe, shape: Sequence[int]) -> float:
    """Return the factor of the learning rate for a matrix of this shape."""
    rows, columns = shape
    if recipe.adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Return a bfloat16 [m, n] with the matrix's singular vectors, values near 1.

    `steps` of the quintic Newton-Schulz iteration, on the wide form of the matrix:
    there the Gram matrix is the smaller one.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
