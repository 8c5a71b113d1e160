"""Powers, differences from numbers, and logarithms of 1 + x."""

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


def _power(formula: Formula, x: Any, exponent: float) -> Activation:
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


def _log1p(formula: Formula, x: Any) -> Activation:
    return formula.unary(Unary.LOG1P, x)


def _expm1(formula: Formula, x: Any) -> Activation:
    return formula.unary(Unary.EXPM1, x)


LOWERINGS: Lowerings = {
    "aten.add.Scalar": lowered(_add),
    "aten.add.Tensor": lowered(_add_scaled),
    "aten.div.Tensor": lowered(_divide),
    "aten.expm1.default": lowered(_expm1),
    "aten.log1p.default": lowered(_log1p),
    "aten.pow.Tensor_Scalar": lowered(_power),
    "aten.rsub.Scalar": lowered(_subtract_from),
    "aten.square.default": lowered(lambda formula, x: formula.mul(x, x)),
    "aten.sub.Scalar": lowered(lambda formula, x, number: formula.sub(x, number)),
    "aten.sub.Tensor": lowered(_subtract),
}
