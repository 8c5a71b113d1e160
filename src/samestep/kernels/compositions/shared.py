"""Gradients of a parameter that is used several times."""

from dataclasses import replace
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch
from samestep.kernels.lowering import (
    Activation,
    SampleSum,
    WeightGradient,
)
from samestep.kernels.tensors import Axis


def added(formula: Formula, a: Any, b: Any) -> SampleSum | WeightGradient:
    """Return the sum of two gradients. Raises Mismatch."""
    match a, b:
        case SampleSum(rows=first), SampleSum(rows=second):
            return SampleSum(formula.add(first, second))
        case WeightGradient(), WeightGradient() if a.shape == b.shape:
            return WeightGradient(
                _one_after_the_other(formula, a.gradient, b.gradient),
                _one_after_the_other(formula, a.inputs, b.inputs),
            )
    raise Mismatch


def _one_after_the_other(
    formula: Formula, first: Activation, second: Activation
) -> Activation:
    """Return the positions of two tensors [..., features] in one."""
    parts = [_positions(formula, x) for x in (first, second)]
    (samples, _, features), sizes = parts[0].dims, [part.shape[1] for part in parts]
    y = formula.lowering.like((samples, (Axis(sum(sizes), 1),), features))
    start = 0
    for part, size in zip(parts, sizes, strict=True):
        place = y.slice(1, start, start + size)
        if place is None or not formula.lowering.copy(part, place):
            raise Mismatch
        start += size
    return replace(y, dims=((*y.dims[0], *y.dims[1]), y.dims[2]))


def _positions(formula: Formula, x: Activation) -> Activation:
    """Return a tensor as [samples, positions, features]."""
    *outer, features = x.dims
    axes = [axis for dim in outer for axis in dim]
    samples = tuple(axis for axis in axes if axis.stride is None)
    if len(samples) != 1:
        raise Mismatch
    others = tuple(axis for axis in axes if axis.stride is not None)
    return replace(x, dims=(samples, others, features))
