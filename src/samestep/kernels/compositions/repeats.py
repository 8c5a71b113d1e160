"""Pixels that are repeated: nearest-neighbour upsampling."""

from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
)


def _upsample(formula: Formula, x: Any, size: Any, *_: Any) -> Activation:
    x = activation(x)
    (rows, columns), (b, c, h, w) = _factors(x.shape, size), x.shape
    repeated = x.view((b, c, h, 1, w, 1))
    spread = repeated and repeated.expand((b, c, h, rows, w, columns))
    if spread is None:
        raise Mismatch
    return formula.shaped(spread)


def _upsample_backward(
    formula: Formula, dy: Any, size: Any, shape: Any, *_: Any
) -> Activation:
    dy = activation(dy)
    (rows, columns), (_, c, h, w) = _factors(shape, size), shape
    cells = dy.view((dy.shape[0], c, h, rows, w, columns))
    cells = cells or formula.lowering.whole(dy).view(
        (dy.shape[0], c, h, rows, w, columns)
    )
    return formula.shaped(formula.sum(cells, (3, 5)))


def _factors(shape: Any, size: Any) -> tuple[int, int]:
    """Return how often rows and columns are repeated."""
    *_, h, w = shape
    if size[0] % h or size[1] % w:
        raise Mismatch
    return size[0] // h, size[1] // w


LOWERINGS: Lowerings = {
    "aten.upsample_nearest2d.default": lowered(_upsample),
    "aten.upsample_nearest2d_backward.default": lowered(_upsample_backward),
}
