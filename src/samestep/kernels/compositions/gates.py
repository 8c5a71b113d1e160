"""Gated linear units: half of the features opens the other half."""

from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Binary, Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
)


def _glu(formula: Formula, x: Any, dim: int = -1) -> Activation:
    value, gate = _halves(activation(x), dim)
    return formula.mul(value, formula.unary(Unary.SIGMOID, gate))


def _glu_backward(formula: Formula, dy: Any, x: Any, dim: int = -1) -> Activation:
    value, gate = _halves(activation(x), dim)
    share = formula.unary(Unary.SIGMOID, gate)
    dx = formula.lowering.like(activation(x).dims)
    to_value, to_gate = _halves(dx, dim)
    slope = formula.binary(Binary.SIGMOID_GRAD, formula.mul(dy, value), share)
    for part, place in ((formula.mul(dy, share), to_value), (slope, to_gate)):
        if not formula.lowering.copy(part, place):
            raise Mismatch
    return dx


def _halves(x: Activation, dim: int) -> tuple[Activation, Activation]:
    dim %= len(x.dims)
    half = x.shape[dim] // 2
    first, second = x.slice(dim, 0, half), x.slice(dim, half, 2 * half)
    if first is None or second is None:
        raise Mismatch
    return first, second


LOWERINGS: Lowerings = {
    "aten.glu.default": lowered(_glu),
    "aten.glu_backward.default": lowered(_glu_backward),
}
