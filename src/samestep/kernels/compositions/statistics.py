"""Norms and deviations over dimensions, and GroupNorm."""

import math
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Unary
from samestep.kernels.lowering import Activation, Lowerings


def _vector_norm(
    formula: Formula, x: Any, order: float = 2, dims: Any = None, keep: bool = False
) -> Activation:
    if order != 2 or not dims:
        raise Mismatch
    squares = formula.sum(formula.mul(x, x), dims)
    return formula.shaped(formula.unary(Unary.SQRT, squares))


def _variance(formula: Formula, x: Any, dims: Any, *rest: Any) -> Activation:
    """Return the mean square of the differences from the mean."""
    x = activation(x)
    options: dict[str, Any] = {}
    for part in rest:
        options |= part if isinstance(part, dict) else {}
    count = math.prod(x.shape[dim] for dim in dims)
    correction = options.get("correction", 1)
    away = formula.sub(x, formula.sum(x, dims, count))
    total = formula.sum(formula.mul(away, away), dims, max(1, count - correction))
    return formula.shaped(total)


def _deviation(formula: Formula, x: Any, dims: Any, *rest: Any) -> Activation:
    return formula.unary(Unary.SQRT, _variance(formula, x, dims, *rest))


LOWERINGS: Lowerings = {
    "aten.linalg_vector_norm.default": lowered(_vector_norm),
    "aten.std.correction": lowered(_deviation),
    "aten.var.correction": lowered(_variance),
}
