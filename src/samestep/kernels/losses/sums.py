"""Sums over the samples of a micro-batch, in its forward pass.

What is linear in such a sum is computed of every sample's share of it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Unary
from samestep.kernels.lowering import Lowerings
from samestep.kernels.values import Activation, SampleSum


def total(formula: Formula, x: Any) -> SampleSum:
    """Return the sum of all elements."""
    if isinstance(x, SampleSum):
        rows = formula.lowering.flat(x.rows)
        return replace(x, rows=_all(formula, rows))
    return SampleSum(_all(formula, activation(x)))


def mean(formula: Formula, x: Any) -> SampleSum:
    """Return the mean of all elements, which is divided by the number of samples."""
    x = activation(x)
    if x.samples_dim is None:
        raise Mismatch
    return SampleSum(_all(formula, x, float(x.size)), divisions=1)


def _all(formula: Formula, x: Activation, divisor: float = 1.0) -> Activation:
    summed = formula.sum_of_sample(x, divisor)
    return replace(summed, dims=())


def _linear(
    own: Callable[[Formula, Any, Any], Activation],
) -> Callable[..., Any]:
    """Return the sum or difference of two sums over samples."""

    def combine(formula: Formula, a: Any, b: Any, *options: Any) -> SampleSum:
        first = _sum(formula, a)
        factor = options[0].get("alpha", 1) if options else 1
        if not isinstance(b, SampleSum) or first.divisions != b.divisions:
            raise Mismatch
        other = b.rows if factor == 1 else formula.mul(b.rows, factor)
        return replace(first, rows=own(formula, first.rows, other))

    return combine


def _scaled(formula: Formula, a: Any, b: Any) -> SampleSum:
    if isinstance(b, SampleSum):
        a, b = b, a
    return _scale(formula, a, b, divides=False)


def _divided(formula: Formula, a: Any, b: Any) -> SampleSum:
    return _scale(formula, a, b, divides=True)


def _scale(formula: Formula, a: Any, number: Any, divides: bool) -> SampleSum:
    """Multiply or divide by a number, perhaps that of the samples."""
    whole = _sum(formula, a)
    data = getattr(number, "data", number)
    if not isinstance(data, int | float):
        if data is None or not hasattr(data, "numel") or data.numel() != 1:
            raise Mismatch
        data = data.item()
    samples, divisions = formula.lowering.trace.samples, whole.divisions
    if isinstance(data, int) and data and data % samples == 0:
        data, divisions = data // samples, divisions + (1 if divides else -1)
    if data == 1:
        return replace(whole, divisions=divisions)
    change = formula.div if divides else formula.mul
    return SampleSum(change(whole.rows, float(data)), divisions)


def _negative(formula: Formula, a: Any) -> SampleSum:
    whole = _sum(formula, a)
    return replace(whole, rows=formula.unary(Unary.NEG, whole.rows))


def _sum(formula: Formula, x: Any) -> SampleSum:
    """Return a sum over samples, in the forward pass. Raises Mismatch."""
    if not isinstance(x, SampleSum) or formula.lowering.gradient is not None:
        raise Mismatch
    return x


LOWERINGS: Lowerings = {
    "aten.add.Tensor": lowered(_linear(Formula.add)),
    "aten.div.Scalar": lowered(_divided),
    "aten.div.Tensor": lowered(_divided),
    "aten.mean.default": lowered(mean),
    "aten.mul.Scalar": lowered(_scaled),
    "aten.mul.Tensor": lowered(_scaled),
    "aten.neg.default": lowered(_negative),
    "aten.sub.Tensor": lowered(_linear(Formula.sub)),
    "aten.sum.default": lowered(total),
}
