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


def _celu(formula: Formula, x: Any, alpha: float = 1.0) -> Activation:
    return _elu(formula, x, alpha, 1.0, 1 / alpha)


def _outside(formula: Formula, x: Any, width: float) -> tuple[Activation, Activation]:
    """Return where x is above `width`, and where it is below -width."""
    above = formula.binary(Binary.GREATER, x, width)
    return above, formula.binary(Binary.LESS, x, -width)


def _softshrink(formula: Formula, x: Any, width: float = 0.5) -> Activation:
    above, below = _outside(formula, x, width)
    lower = formula.binary(Binary.WHERE, formula.sub(x, width), above)
    return formula.add(
        lower, formula.binary(Binary.WHERE, formula.add(x, width), below)
    )


def _hardshrink(formula: Formula, x: Any, width: float = 0.5) -> Activation:
    return _shrink_backward(formula, x, x, width)


def _shrink_backward(formula: Formula, dy: Any, x: Any, width: float) -> Activation:
    above, below = _outside(formula, x, width)
    return formula.binary(Binary.WHERE, dy, formula.binary(Binary.MAX, above, below))


def _threshold(formula: Formula, x: Any, least: float, value: float) -> Activation:
    above = formula.binary(Binary.GREATER, x, least)
    return formula.choose(above, x, formula.filled(x, value))


def _threshold_backward(formula: Formula, dy: Any, x: Any, least: float) -> Activation:
    above = formula.binary(Binary.GREATER, x, least)
    return formula.binary(Binary.WHERE, dy, above)


def _round(formula: Formula, x: Any, *_: Any) -> Activation:
    """Return the nearest whole number, of two the even one."""
    nearest = formula.sub(formula.add(x, WHOLE * 1.5), WHOLE * 1.5)
    is_small = formula.binary(Binary.LESS, formula.unary(Unary.ABS, x), WHOLE / 2)
    return formula.choose(is_small, nearest, x)


def _floor(formula: Formula, x: Any) -> Activation:
    nearest = _round(formula, x)
    return formula.sub(nearest, formula.binary(Binary.GREATER, nearest, x))


def _ceil(formula: Formula, x: Any) -> Activation:
    nearest = _round(formula, x)
    return formula.add(nearest, formula.binary(Binary.LESS, nearest, x))


def _trunc(formula: Formula, x: Any) -> Activation:
    above = formula.binary(Binary.GREATER, x, 0.0)
    return formula.choose(above, _floor(formula, x), _ceil(formula, x))


def _remainder(formula: Formula, x: Any, divisor: Any) -> Activation:
    times = _floor(formula, formula.div(x, divisor))
    return formula.sub(x, formula.mul(times, divisor))


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


WHOLE = 2.0**23
"""From here on all floats are whole numbers."""
LOWERINGS: Lowerings = {
    "aten._prelu_kernel.default": lowered(_prelu),
    "aten._prelu_kernel_backward.default": lowered(_prelu_backward),
    "aten.ceil.default": lowered(_ceil),
    "aten.celu.default": lowered(_celu),
    "aten.elu.default": lowered(_elu),
    "aten.elu_backward.default": lowered(_elu_backward),
    "aten.floor.default": lowered(_floor),
    "aten.hardshrink.default": lowered(_hardshrink),
    "aten.hardshrink_backward.default": lowered(_shrink_backward),
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
    "aten.remainder.Scalar": lowered(_remainder),
    "aten.round.default": lowered(_round),
    "aten.softplus.default": lowered(_softplus),
    "aten.softplus_backward.default": lowered(_softplus_backward),
    "aten.softshrink.default": lowered(_softshrink),
    "aten.softshrink_backward.default": lowered(_shrink_backward),
    "aten.threshold.default": lowered(_threshold),
    "aten.threshold_backward.default": lowered(_threshold_backward),
    "aten.trunc.default": lowered(_trunc),
}
