"""Norms and deviations over dimensions, and GroupNorm."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from samestep.kernels.compositions.extremes import largest
from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.compositions.powers import power
from samestep.kernels.interface import Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
    Constant,
    Opaque,
    Parameter,
    SampleSum,
)


def _vector_norm(
    formula: Formula, x: Any, order: float = 2, dims: Any = None, keep: bool = False
) -> Activation:
    if not dims:
        raise Mismatch
    if order == 1:
        return formula.shaped(formula.sum(formula.unary(Unary.ABS, x), dims))
    if order == math.inf:
        return formula.shaped(largest(formula, formula.unary(Unary.ABS, x), dims))
    if order != 2:
        powers = power(formula, formula.unary(Unary.ABS, x), order)
        return formula.shaped(power(formula, formula.sum(powers, dims), 1 / order))
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


def _variance_and_mean(formula: Formula, x: Any, dims: Any, *rest: Any) -> list[Any]:
    count = math.prod(activation(x).shape[dim] for dim in dims)
    mean = formula.shaped(formula.sum(x, dims, count))
    return [_variance(formula, x, dims, *rest), mean]


def _deviation_and_mean(formula: Formula, x: Any, dims: Any, *rest: Any) -> list[Any]:
    variance, mean = _variance_and_mean(formula, x, dims, *rest)
    return [formula.unary(Unary.SQRT, variance), mean]


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


@dataclass(frozen=True)
class Standardised(Opaque):
    """What the gradient of a batch norm needs that is a formula."""

    z: Activation
    """[planes..., channels, values]"""
    inverse: Activation | Constant
    is_constant: bool
    """Whether statistics are, or else those of the values themselves."""


def _batch_norm(
    formula: Formula,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> list[Any]:
    """Standardise by statistics that stay, or by those of each sample's channels.

    The latter is InstanceNorm, which PyTorch computes as a batch norm of b * channels
    channels.
    """
    x = activation(x)
    if not training and isinstance(mean, Constant) and isinstance(variance, Constant):
        inverse = _rsqrt(variance, eps)
        away = formula.sub(x, _channels(mean, x))
        saved = Standardised(formula.mul(away, _channels(inverse, x)), inverse, True)
    elif training and mean is None and x.samples_dim == 1 and not x.dims[0]:
        x = _apart(x)
        dims = tuple(range(2, len(x.dims)))
        count = math.prod(x.shape[2:])
        away = formula.sub(x, formula.sum(x, dims, count))
        spread = formula.sum(formula.mul(away, away), dims, count)
        inverted = formula.unary(Unary.RSQRT, formula.add(spread, eps))
        saved = Standardised(formula.mul(away, inverted), inverted, False)
    else:
        raise Mismatch
    y = saved.z
    if weight is not None:
        y = formula.mul(y, _channels(weight, x))
    if bias is not None:
        y = formula.add(y, _channels(bias, x))
    return [y if saved.is_constant else _together(y), saved, saved]


def _batch_norm_backward(
    formula: Formula,
    dy: Any,
    x: Any,
    weight: Any,
    mean: Any,
    variance: Any,
    saved: Any,
    _: Any,
    training: bool,
    eps: float,
    wanted: Any,
) -> list[Any]:
    if not isinstance(saved, Standardised):
        raise Mismatch
    dy, z = activation(dy), saved.z
    dy = dy if saved.is_constant else _apart(dy)
    dims = tuple(range(2, len(z.dims)))
    gradients: list[Any] = []
    if wanted[0]:
        g = dy if weight is None else formula.mul(dy, _channels(weight, z))
        if saved.is_constant:
            gradients.append(formula.mul(g, _channels(saved.inverse, z)))
        else:
            count = math.prod(z.shape[2:])
            along = formula.mul(z, formula.sum(formula.mul(g, z), dims, count))
            rest = formula.sub(formula.sub(g, formula.sum(g, dims, count)), along)
            gradients.append(_together(formula.mul(rest, saved.inverse)))
    for is_wanted, part in ((wanted[1], formula.mul(dy, z)), (wanted[2], dy)):
        if is_wanted:
            total = formula.sum(part, dims) if dims else part
            channels = replace(total, dims=(total.dims[1],))
            each = replace(total, dims=((*total.dims[0], *total.dims[1]),))
            gradients.append(SampleSum(channels) if saved.is_constant else each)
    return gradients


def _rsqrt(variance: Constant, eps: float) -> Constant:
    """Return 1 / sqrt(variance + eps) of a constant, each operation rounded."""
    root = np.sqrt(variance.data.detach().numpy() + np.float32(eps))
    inverse = torch.from_numpy(np.float32(1) / root)
    return replace(variance, name=f"1 / sqrt({variance.name} + {eps})", data=inverse)


def _apart(x: Activation) -> Activation:
    """Return [1, b * channels, ...] as [b, channels, ...]."""
    samples, *others = x.dims[1]
    if samples.stride is not None:
        raise Mismatch
    return replace(x, dims=((samples,), tuple(others), *x.dims[2:]))


def _together(x: Activation) -> Activation:
    """Return [b, channels, ...] as [1, b * channels, ...]."""
    return replace(x, dims=((), (*x.dims[0], *x.dims[1]), *x.dims[2:]))


def _channels(vector: Any, x: Activation) -> Parameter:
    """Return [channels] as [channels, 1, ...], for activations like x."""
    if not isinstance(vector, Parameter):
        raise Mismatch
    channels = tuple(axis for axis in vector.dims[0] if axis.stride != 0)
    return replace(vector, dims=(channels, *((),) * (len(x.dims) - 2)))


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
    "aten.native_batch_norm.default": lowered(_batch_norm),
    "aten.native_batch_norm_backward.default": lowered(_batch_norm_backward),
    "aten.native_group_norm.default": lowered(_group_norm),
    "aten.native_group_norm_backward.default": lowered(_group_norm_backward),
    "aten.linalg_vector_norm.default": lowered(_vector_norm),
    "aten.norm.ScalarOpt_dim": lowered(_vector_norm),
    "aten.std.correction": lowered(_deviation),
    "aten.std_mean.correction": lowered(_deviation_and_mean),
    "aten.var.correction": lowered(_variance),
    "aten.var_mean.correction": lowered(_variance_and_mean),
}
