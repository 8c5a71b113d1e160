"""Powers, differences from numbers, and logarithms of 1 + x."""

from collections.abc import Callable
from typing import Any

from samestep.kernels.compositions.formula import (
    Formula,
    Mismatch,
    activation,
    lowered,
)
from samestep.kernels.interface import Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
)


def power(formula: Formula, x: Any, exponent: float) -> Activation:
    """Return x ** exponent; a product for whole exponents up to 8."""
    if exponent == 0:
        return formula.add(formula.unary(Unary.FILL, x), 1.0)
    if float(exponent).is_integer() and abs(exponent) <= 8:
        y = activation(x)
        for _ in range(int(abs(exponent)) - 1):
            y = formula.mul(y, x)
        return y if exponent > 0 else formula.unary(Unary.RECIPROCAL, y)
    if exponent == 0.5:
        return formula.unary(Unary.SQRT, x)
    if exponent == -0.5:
        return formula.unary(Unary.RSQRT, x)
    logarithm = formula.unary(Unary.LOG, x)
    return formula.unary(Unary.EXP, formula.mul(logarithm, exponent))


def _add(formula: Formula, a: Any, b: Any, factor: float = 1) -> Activation:
    """Return a + factor * b."""
    if factor != 1:
        b = b * factor if isinstance(b, int | float) else formula.mul(b, factor)
    return formula.add(a, b)


def _add_scaled(formula: Formula, a: Any, b: Any, options: Any = None) -> Any:
    if not isinstance(a, Activation):
        a, b = b, a
        if options:
            raise Mismatch
    return _add(formula, a, b, (options or {}).get("alpha", 1))


def _subtract(formula: Formula, a: Any, b: Any, options: Any = None) -> Activation:
    factor = (options or {}).get("alpha", 1)
    if not isinstance(a, Activation):
        return formula.add(formula.mul(b, -float(factor)), a)
    if factor != 1:
        b = b * factor if isinstance(b, int | float) else formula.mul(b, factor)
    return formula.sub(a, b)


def _subtract_from(formula: Formula, x: Any, number: float, factor: float = 1) -> Any:
    """Return number - factor * x."""
    return formula.add(formula.mul(x, -float(factor)), number)


def _divide(formula: Formula, a: Any, b: Any) -> Activation:
    if isinstance(a, Activation):
        return formula.div(a, b)
    return formula.mul(formula.unary(Unary.RECIPROCAL, b), a)


def _base(formula: Formula, base: float, x: Any) -> Activation:
    """Return base ** x; `base` is a positive number."""
    logarithm = formula.unary(Unary.LOG, formula.filled(activation(x), base))
    return formula.unary(Unary.EXP, formula.mul(logarithm, x))


def _any_power(formula: Formula, x: Any, exponent: Any) -> Activation:
    logarithm = formula.unary(Unary.LOG, x)
    return formula.unary(Unary.EXP, formula.mul(logarithm, exponent))


def _logarithm(factor: float) -> Callable[..., Activation]:
    return lambda formula, x: formula.mul(formula.unary(Unary.LOG, x), factor)


def _lerp(formula: Formula, a: Any, b: Any, share: Any) -> Activation:
    return formula.add(a, formula.mul(formula.sub(b, a), share))


def _add_product(
    formula: Formula, x: Any, a: Any, b: Any, options: Any = None
) -> Activation:
    product = formula.mul(a, b)
    return _add(formula, x, product, (options or {}).get("value", 1))


def _add_quotient(
    formula: Formula, x: Any, a: Any, b: Any, options: Any = None
) -> Activation:
    quotient = formula.div(a, b)
    return _add(formula, x, quotient, (options or {}).get("value", 1))


def _hyperbolic(sign: int) -> Callable[..., Activation]:
    """Return sinh (sign -1) or cosh, as (e^x + sign * e^-x) / 2."""

    def function(formula: Formula, x: Any) -> Activation:
        up = formula.unary(Unary.EXP, x)
        down = formula.unary(Unary.EXP, formula.unary(Unary.NEG, x))
        both = formula.add(up, down) if sign > 0 else formula.sub(up, down)
        return formula.mul(both, 0.5)

    return function


def _log1p(formula: Formula, x: Any) -> Activation:
    return formula.unary(Unary.LOG1P, x)


def _expm1(formula: Formula, x: Any) -> Activation:
    return formula.unary(Unary.EXPM1, x)


LOWERINGS: Lowerings = {
    "aten.add.Scalar": lowered(_add),
    "aten.addcdiv.default": lowered(_add_quotient),
    "aten.addcmul.default": lowered(_add_product),
    "aten.cosh.default": lowered(_hyperbolic(1)),
    "aten.exp2.default": lowered(lambda formula, x: _base(formula, 2.0, x)),
    "aten.lerp.Scalar": lowered(_lerp),
    "aten.lerp.Tensor": lowered(_lerp),
    "aten.log10.default": lowered(_logarithm(0.4342944819032518)),
    "aten.log2.default": lowered(_logarithm(1.4426950408889634)),
    "aten.pow.Scalar": lowered(_base),
    "aten.pow.Tensor_Tensor": lowered(_any_power),
    "aten.pow_.Scalar": lowered(power),
    "aten.sinh.default": lowered(_hyperbolic(-1)),
    "aten.add.Tensor": lowered(_add_scaled),
    "aten.div.Tensor": lowered(_divide),
    "aten.expm1.default": lowered(_expm1),
    "aten.log1p.default": lowered(_log1p),
    "aten.pow.Tensor_Scalar": lowered(power),
    "aten.rsub.Scalar": lowered(_subtract_from),
    "aten.square.default": lowered(lambda formula, x: formula.mul(x, x)),
    "aten.sub.Scalar": lowered(lambda formula, x, number: formula.sub(x, number)),
    "aten.sub.Tensor": lowered(_subtract),
}
