"""Adafactor: a running square of rank one (Shazeer and Stern 2018, arXiv:1804.04235).

With the gradient `g` [..., m, n], the running means of its squares over rows `r` and
over columns `c`, and RMS(x) the root mean square of a tensor, step t is

    b = t ** beta2_decay
    r = (1 - b) * r + b * mean over columns of g^2
    c = (1 - b) * c + b * mean over rows of g^2
    u = g / sqrt(max(r c / max(mean of r, eps1), eps1^2))
    w = w * (1 - lr * weight_decay)
    w = w - max(eps2, RMS(w)) * min(lr, 1 / sqrt(t)) * u / max(1, RMS(u) / d)

A vector has a running square of its own instead of `r c / mean of r`. The operations
are those of `torch.optim.Adafactor`, in its order: RMS(w) is taken before the decay.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.config.optimizer import AdafactorRecipe
from samestep.optim.step import Step


def update(
    recipe: AdafactorRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update a whole parameter and its states in place; all tensors have its shape.

    `r` is the first column of the first state, `c` the first row of the second, and
    the square of a vector all of the second; the rest stays zero.
    """
    eps = recipe.eps1 or torch.finfo(weights.dtype).eps
    rate = min(step.lr, step.number**-0.5)
    scale = max(recipe.eps2, _rms(weights)) * rate
    if step.weight_decay:
        weights.mul_(1 - step.lr * step.weight_decay)
    square = _square(gradient, states, step.number**recipe.beta2_decay, eps)
    direction = square.clamp_(min=eps * eps).rsqrt_().mul_(gradient)
    clipped = max(1.0, _rms(direction) / recipe.d)
    weights.add_(direction, alpha=-scale / clipped)


def _square(
    gradient: Tensor, states: Sequence[Tensor], share: float, eps: float
) -> Tensor:
    """Advance the states; return a new tensor, the estimate of the running square."""
    if gradient.dim() <= 1:
        return states[1].lerp_(gradient * gradient, share).clone()
    rows, columns = states[0][..., :1], states[1][..., :1, :]
    rows.lerp_(_mean_square(gradient, -1), share)
    columns.lerp_(_mean_square(gradient, -2), share)
    # Contiguous as torch's state, which decides the order in which they are added.
    mean = rows.contiguous().mean(dim=-2, keepdim=True).clamp_(min=eps)
    return (rows @ columns).div_(mean)


def _mean_square(gradient: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient, dim=dim, keepdim=True)
    return norm.square_().div_(gradient.size(dim))


def _rms(tensor: Tensor) -> float:
    return float(tensor.norm().item()) / math.sqrt(tensor.numel())
