"""Norms and deviations over dimensions, and GroupNorm."""

import math
from dataclasses import replace
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
    Parameter,
    SampleSum,
)


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


def _group_norm(
    formula: Formula,
    x: Any,
    weight: Any,
    bias: Any,
    b: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> list[Any]:
    """Return y, and [b, groups, 1] means and inverse deviations."""
    x = activation(x)
    values = _grouped(formula, x, groups)
    count = values.shape[2]
    mean = formula.sum(values, (2,), count)
    away = formula.sub(values, mean)
    variance = formula.sum(formula.mul(away, away), (2,), count)
    inverse = formula.unary(Unary.RSQRT, formula.add(variance, eps))
    y = _viewed(formula, formula.mul(away, inverse), (x.shape[0], channels, pixels))
    if weight is not None:
        y = formula.mul(y, _by_channel(weight))
    if bias is not None:
        y = formula.add(y, _by_channel(bias))
    return [_viewed(formula, y, x.shape), mean, inverse]


def _group_norm_backward(
    formula: Formula,
    dy: Any,
    x: Any,
    mean: Any,
    inverse: Any,
    weight: Any,
    b: int,
    channels: int,
    pixels: int,
    groups: int,
    wanted: Any,
) -> list[Any]:
    x = activation(x)
    by_channel = (x.shape[0], channels, pixels)
    dy = _viewed(formula, activation(dy), by_channel)
    away = formula.sub(_grouped(formula, x, groups), mean)
    z = _viewed(formula, formula.mul(away, inverse), by_channel)
    gradients: list[Any] = []
    if wanted[0]:
        scaled = dy if weight is None else formula.mul(dy, _by_channel(weight))
        g, z_of = (_grouped(formula, part, groups) for part in (scaled, z))
        count = g.shape[2]
        along = formula.mul(z_of, formula.sum(formula.mul(g, z_of), (2,), count))
        rest = formula.sub(formula.sub(g, formula.sum(g, (2,), count)), along)
        gradients.append(_viewed(formula, formula.mul(rest, inverse), x.shape))
    for is_wanted, part in ((wanted[1], formula.mul(dy, z)), (wanted[2], dy)):
        if is_wanted:
            total = formula.sum(part, (2,))
            gradients.append(SampleSum(_without(total)))
    return gradients


def _grouped(formula: Formula, x: Activation, groups: int) -> Activation:
    return _viewed(formula, x, (x.shape[0], groups, x.size // groups))


def _viewed(formula: Formula, x: Activation, shape: Any) -> Activation:
    viewed = x.view(shape) or formula.lowering.whole(x).view(shape)
    if viewed is None:
        raise Mismatch
    return viewed


def _by_channel(parameter: Any) -> Parameter:
    """Return [channels] as [channels, 1]."""
    if not isinstance(parameter, Parameter):
        raise Mismatch
    return parameter.unsqueeze(1)


def _without(total: Activation) -> Activation:
    """Return [b, channels, 1] as [channels], for the sum over samples."""
    return replace(total, dims=(total.dims[1],))


LOWERINGS: Lowerings = {
    "aten.native_group_norm.default": lowered(_group_norm),
    "aten.native_group_norm_backward.default": lowered(_group_norm_backward),
    "aten.linalg_vector_norm.default": lowered(_vector_norm),
    "aten.std.correction": lowered(_deviation),
    "aten.var.correction": lowered(_variance),
}
