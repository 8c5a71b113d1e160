"""Activations that are one formula on one side of a point, another on the other."""

from typing import Any

from samestep.kernels.compositions.formula import Formula, lowered
from samestep.kernels.interface import Binary, Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
    Parameter,
)


def _leaky_relu(formula: Formula, x: Any, slope: float = 0.01) -> Activation:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    return formula.choose(mask, x, formula.mul(x, slope))


def _leaky_relu_backward(
    formula: Formula, dy: Any, x: Any, slope: float, _: bool
) -> Activation:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    return formula.choose(mask, dy, formula.mul(dy, slope))


def _elu(
    formula: Formula, x: Any, alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0
) -> Activation:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    below = formula.unary(Unary.EXPM1, formula.mul(x, rate))
    return formula.choose(
        mask, formula.mul(x, scale), formula.mul(below, alpha * scale)
    )


def _elu_backward(
    formula: Formula,
    dy: Any,
    alpha: float,
    scale: float,
    rate: float,
    is_result: bool,
    x: Any,
) -> Activation:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    if is_result:
        slope = formula.mul(formula.add(x, alpha * scale), rate)
    else:
        power = formula.unary(Unary.EXP, formula.mul(x, rate))
        slope = formula.mul(power, alpha * scale * rate)
    return formula.choose(mask, formula.mul(dy, scale), formula.mul(dy, slope))


def softplus(formula: Formula, x: Any) -> Activation:
    """Return log(1 + e^x) as max(x, 0) + log1p(e^-|x|)."""
    small = formula.unary(
        Unary.EXP, formula.unary(Unary.NEG, formula.unary(Unary.ABS, x))
    )
    return formula.add(
        formula.unary(Unary.LOG1P, small), formula.binary(Binary.MAX, x, 0.0)
    )


def _softplus(
    formula: Formula, x: Any, beta: float = 1.0, threshold: float = 20.0
) -> Activation:
    scaled = formula.mul(x, beta)
    mask = formula.binary(Binary.GREATER, scaled, threshold)
    return formula.choose(mask, x, formula.div(softplus(formula, scaled), beta))


def _softplus_backward(
    formula: Formula, dy: Any, x: Any, beta: float, threshold: float
) -> Activation:
    scaled = formula.mul(x, beta)
    mask = formula.binary(Binary.GREATER, scaled, threshold)
    slope = formula.mul(dy, formula.unary(Unary.SIGMOID, scaled))
    return formula.choose(mask, dy, slope)


def _hardtanh_backward(
    formula: Formula, dy: Any, x: Any, low: float, high: float
) -> Activation:
    above = formula.binary(Binary.GREATER, x, low)
    below = formula.binary(Binary.LESS, x, high)
    return formula.binary(Binary.WHERE, formula.binary(Binary.WHERE, dy, above), below)


def _ramp(formula: Formula, x: Any) -> Activation:
    """Return (x + 3) / 6, cut to [0, 1]."""
    cut = formula.binary(Binary.MAX, formula.add(x, 3.0), 0.0)
    return formula.div(formula.binary(Binary.MIN, cut, 6.0), 6.0)


def _hardswish(formula: Formula, x: Any) -> Activation:
    return formula.mul(_ramp(formula, x), x)


def _hardswish_backward(formula: Formula, dy: Any, x: Any) -> Activation:
    slope = formula.add(formula.div(x, 3.0), 0.5)
    inner = formula.choose(
        formula.binary(Binary.AT_MOST, x, 3.0),
        formula.mul(dy, slope),
        dy,
    )
    return formula.binary(Binary.WHERE, inner, formula.binary(Binary.AT_LEAST, x, -3.0))


def _hardsigmoid_backward(formula: Formula, dy: Any, x: Any) -> Activation:
    return formula.div(_hardtanh_backward(formula, dy, x, -3.0, 3.0), 6.0)


def _mish(formula: Formula, x: Any) -> Activation:
    return formula.mul(formula.unary(Unary.TANH, softplus(formula, x)), x)


def _mish_backward(formula: Formula, dy: Any, x: Any) -> Activation:
    share = formula.unary(Unary.TANH, softplus(formula, x))
    slope = formula.mul(formula.unary(Unary.SIGMOID, x), x)
    rest = formula.add(formula.unary(Unary.NEG, formula.mul(share, share)), 1.0)
    return formula.mul(formula.add(formula.mul(slope, rest), share), dy)


def _prelu(formula: Formula, x: Any, weight: Any) -> Activation:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    return formula.choose(mask, x, formula.mul(x, weight))


def _prelu_backward(formula: Formula, dy: Any, x: Any, weight: Any) -> list[Any]:
    mask = formula.binary(Binary.GREATER, x, 0.0)
    assert isinstance(weight, Parameter)
    to_weight = formula.binary(Binary.WHERE_NOT, formula.mul(dy, x), mask)
    return [formula.choose(mask, dy, formula.mul(dy, weight)), to_weight]


def _log_sigmoid(formula: Formula, x: Any) -> list[Any]:
    flipped = formula.unary(Unary.NEG, x)
    return [formula.unary(Unary.NEG, softplus(formula, flipped)), flipped]


def _log_sigmoid_backward(formula: Formula, dy: Any, x: Any, _: Any) -> Activation:
    share = formula.unary(Unary.SIGMOID, formula.unary(Unary.NEG, x))
    return formula.mul(dy, share)


LOWERINGS: Lowerings = {
    "aten._prelu_kernel.default": lowered(_prelu),
    "aten._prelu_kernel_backward.default": lowered(_prelu_backward),
    "aten.elu.default": lowered(_elu),
    "aten.elu_backward.default": lowered(_elu_backward),
    "aten.hardsigmoid.default": lowered(_ramp),
    "aten.hardsigmoid_backward.default": lowered(_hardsigmoid_backward),
    "aten.hardswish.default": lowered(_hardswish),
    "aten.hardswish_backward.default": lowered(_hardswish_backward),
    "aten.hardtanh_backward.default": lowered(_hardtanh_backward),
    "aten.leaky_relu.default": lowered(_leaky_relu),
    "aten.leaky_relu_backward.default": lowered(_leaky_relu_backward),
    "aten.log_sigmoid_backward.default": lowered(_log_sigmoid_backward),
    "aten.log_sigmoid_forward.default": lowered(_log_sigmoid),
    "aten.mish.default": lowered(_mish),
    "aten.mish_backward.default": lowered(_mish_backward),
    "aten.softplus.default": lowered(_softplus),
    "aten.softplus_backward.default": lowered(_softplus_backward),
}
