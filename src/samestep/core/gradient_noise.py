"""The gradient noise scale: how large a global batch is still worth its samples.

A batch of b samples has a gradient with E|g_b|^2 = |G|^2 + tr(S) / b, where G is the
true gradient and S the covariance of a sample's gradient. The micro-batches of one step
and the whole global batch are two such sizes, so both unknowns follow, without bias.
Their ratio B = tr(S) / |G|^2, in samples, is the simple noise scale, which estimates
the critical batch size (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1): the
samples needed to reach a loss grow with the global batch b as 1 + b / B, the steps as
1 + B / b.

Micro-batches are the same at any number of workers, and so is every bit of this.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


EVERY = 25
"""One step in this many is watched: in every step, squared norms would cost 10% of
the time at a global batch of 64 (docs/log.md)."""


def estimate(
    squares: Sequence[float], sizes: Sequence[float], whole: float
) -> tuple[float, float]:
    """Estimate |G|^2 and tr(S) from one step.

    `squares[m]` is the squared norm of what micro-batch `m` of `sizes[m]` samples adds
    to the gradient, and `whole` that of the gradient itself. At least two micro-batches
    must have samples. Sums are exact: `sum` depends on the version of Python.
    """
    batch = math.fsum(sizes)
    means = [
        square * (batch / size) * (batch / size)
        for square, size in zip(squares, sizes, strict=True)
        if size
    ]
    inverse = math.fsum(1 / size for size in sizes if size) / len(means)
    variance = (math.fsum(means) / len(means) - whole) / (inverse - 1 / batch)
    return whole - variance / batch, variance


class Watch:
    """Squared norms of the gradients of single micro-batches, in watched steps.

    Norms are taken parameter by parameter, since an exchange over buckets never has a
    micro-batch's whole gradient in one place.
    """

    def __init__(self, leaves: int, parameters: int) -> None:
        self._cells = torch.zeros(leaves, parameters, dtype=torch.float64)
        self.active = False

    def begin(self, step: int) -> None:
        """Begin a step, counted from 0 over all epochs."""
        self.active = step % EVERY == 0 and len(self._cells) > 1
        if self.active:
            self._cells.zero_()

    def note(
        self,
        leaf: int,
        gradients: Sequence[Tensor | None],
        positions: Sequence[int] | None = None,
    ) -> None:
        """Record the gradients of a micro-batch: of all parameters or of `positions`.

        None is a gradient of zeros.
        """
        for position, gradient in zip(
            positions or range(len(gradients)), gradients, strict=True
        ):
            if gradient is not None:
                norm = torch.linalg.vector_norm(gradient)
                self._cells[leaf, position] = norm.double().square()

    def note_square(self, leaf: int, square: float) -> None:
        """Record the squared norm of a micro-batch's whole gradient."""
        self._cells[leaf, 0] = square

    @property
    def squares(self) -> Tensor:
        """Squared norms, float64 [leaves]; zero for those of other workers."""
        return self._cells.sum(dim=1)
