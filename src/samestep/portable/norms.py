"""Norms and averages of vectors by portable kernels."""

import math

import torch
from torch import Tensor

from samestep.kernels.interface import Kernels
from samestep.state.layout import BLOCK


def block_norms(kernels: Kernels, gradient: Tensor) -> Tensor:
    """Return the squared L2 norms of the blocks of a gradient [n]: float64 [n / BLOCK].

    n is a multiple of BLOCK.
    """
    squares = torch.zeros(len(gradient) // BLOCK, dtype=torch.float64)
    kernels.squared_norms(gradient.data_ptr(), squares.data_ptr(), len(squares))
    return squares


def squared_norm(kernels: Kernels, gradient: Tensor) -> float:
    """Return the squared L2 norm of a whole gradient [size], the exact sum rounded."""
    return math.fsum(block_norms(kernels, gradient).tolist())


def move_average(
    kernels: Kernels, average: Tensor, parameters: Tensor, weight: float
) -> None:
    """Move an average [n], in place, towards parameters [n] by a share `weight`."""
    kernels.average(average.data_ptr(), parameters.data_ptr(), weight, len(average))
