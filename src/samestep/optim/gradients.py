"""What happens to a gradient between the exchange and the update.

Every worker holds its own slice of the gradient, at least. A norm of the whole gradient
is summed from the norms of fixed blocks, so its bits do not depend on who owns which.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.core import gradient_noise
from samestep.core.tree import tree_sum
from samestep.exchange import Exchange
from samestep.state.flat import block_norms
from samestep.state.layout import BLOCK


def rescale_to_counts(
    gradient: Tensor, counts: Tensor, num_targets: int, num_samples: int
) -> tuple[float, list[float]]:
    """Divide a gradient [n], in place, by what the losses counted.

    It was divided by `num_targets`, the number of all targets, since the counts are
    only known after the forward passes. `counts` is float64 [M], of each micro-batch.
    Returns the factor, and how many of the `num_samples` samples each micro-batch
    weighs. If nothing counts, the gradient becomes zero and so does the factor.
    """
    total = tree_sum(counts).item()
    if not total:
        gradient.zero_()
        return 0.0, [0.0] * len(counts)
    factor = num_targets / total
    gradient.mul_(factor)
    return factor, (counts * (num_samples / total)).tolist()


@dataclass(frozen=True)
class Norms:
    """How squared norms are computed."""

    of_blocks: Callable[[Tensor], Tensor]
    """Squared norms of the blocks of a gradient [n]: float64 [n / BLOCK]."""
    total: Callable[[Tensor], float]
    """Their sum."""


TORCH_NORMS = Norms(block_norms, lambda cells: cells.sum().item())


def clip(
    gradient: Tensor, max_norm: float, exchange: Exchange, norms: Norms = TORCH_NORMS
) -> None:
    """All workers: scale a gradient [n], in place, to an L2 norm of at most `max_norm`.

    The norm is that of the whole gradient (Pascanu et al. 2013, arXiv:1211.5063).
    """
    norm = math.sqrt(squared_norm(gradient, exchange, norms))
    if norm > max_norm:
        gradient.mul_(max_norm / norm)


def squared_norm(
    gradient: Tensor, exchange: Exchange, norms: Norms = TORCH_NORMS
) -> float:
    """All workers: return the squared L2 norm of the whole gradient.

    `gradient` [n] is this worker's slice, `exchange.owned`.
    """
    cells = torch.zeros(len(exchange.parameters) // BLOCK, dtype=torch.float64)
    first, end = (cut // BLOCK for cut in exchange.owned)
    cells[first:end] = norms.of_blocks(gradient)
    return norms.total(exchange.merge_slices(cells))


def estimate_noise(
    gradient: Tensor,
    factor: float,
    sizes: Sequence[float],
    exchange: Exchange,
    norms: Norms = TORCH_NORMS,
) -> tuple[float, float] | None:
    """All workers: return one estimate of (|G|^2, tr(S)), see `core.gradient_noise`.

    `factor` is what the gradient was multiplied by after the exchange, `sizes` the
    samples of each micro-batch. None if fewer than two have samples.
    """
    squares = (exchange.merge(exchange.watch.squares) * factor**2).tolist()
    whole = squared_norm(gradient, exchange, norms)
    if sum(size > 0 for size in sizes) < 2:
        return None
    return gradient_noise.estimate(squares, sizes, whole)
