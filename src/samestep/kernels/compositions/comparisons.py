"""Comparisons, which give 1 or 0, and what chooses by them."""

from collections.abc import Callable
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Binary, Unary
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.values import (
    Activation,
    Constant,
    Parameter,
)


def _compare(function: Binary) -> Callable[..., Activation]:
    def compare(formula: Formula, a: Any, b: Any) -> Activation:
        return formula.binary(function, a, b)

    return compare


def _not_equal(formula: Formula, a: Any, b: Any) -> Activation:
    return _not(formula, formula.binary(Binary.EQUAL, a, b))


def _not(formula: Formula, a: Any) -> Activation:
    return formula.binary(Binary.EQUAL, a, 0.0)


def _and(formula: Formula, a: Any, b: Any) -> Activation:
    return formula.binary(Binary.WHERE, a, b)


def _or(formula: Formula, a: Any, b: Any) -> Activation:
    return formula.binary(Binary.MAX, a, b)


def _where(formula: Formula, mask: Any, a: Any, b: Any) -> Activation:
    like = next((x for x in (a, b, mask) if isinstance(x, Activation)), None)
    if like is None:
        raise Mismatch
    a, b = (
        part if isinstance(part, Activation) else _spread(formula, like, part)
        for part in (a, b)
    )
    return formula.choose(mask, a, b)


def _spread(formula: Formula, like: Activation, part: Any) -> Activation:
    """Return a number or a parameter as an activation."""
    if isinstance(part, Constant) and part.data.numel() == 1:
        part = float(part.data)
    zeros = formula.unary(Unary.FILL, like)
    return formula.add(zeros, part)


def _masked_fill(formula: Formula, x: Any, mask: Any, number: Any) -> Activation:
    if isinstance(number, Constant) and number.data.numel() == 1:
        number = float(number.data)
    if not isinstance(number, int | float) or not isinstance(
        mask, Activation | Parameter
    ):
        raise Mismatch
    spread = _spread(formula, activation(x), number)
    return formula.choose(mask, spread, x)


def _clamp(
    formula: Formula, x: Any, low: float | None = None, high: float | None = None
) -> Activation:
    if low is not None:
        x = formula.binary(Binary.MAX, x, low)
    if high is not None:
        x = formula.binary(Binary.MIN, x, high)
    return activation(x)


def _clamp_max(formula: Formula, x: Any, high: float) -> Activation:
    return formula.binary(Binary.MIN, x, high)


def _sign(formula: Formula, x: Any) -> Activation:
    above = formula.binary(Binary.GREATER, x, 0.0)
    return formula.sub(above, formula.binary(Binary.LESS, x, 0.0))


COMPARISONS = {
    "gt": Binary.GREATER,
    "ge": Binary.AT_LEAST,
    "lt": Binary.LESS,
    "le": Binary.AT_MOST,
    "eq": Binary.EQUAL,
}
LOWERINGS: Lowerings = {
    **{
        f"aten.{name}.{overload}": lowered(_compare(function))
        for name, function in COMPARISONS.items()
        for overload in ("Scalar", "Tensor")
    },
    "aten.bitwise_and.Tensor": lowered(_and),
    "aten.bitwise_not.default": lowered(_not),
    "aten.bitwise_or.Tensor": lowered(_or),
    "aten.clamp.default": lowered(_clamp),
    "aten.clamp_max.default": lowered(_clamp_max),
    "aten.clamp_min.default": lowered(_clamp),
    "aten.hardtanh.default": lowered(
        lambda formula, x, low=-1.0, high=1.0: _clamp(formula, x, low, high)
    ),
    "aten.logical_and.default": lowered(_and),
    "aten.logical_not.default": lowered(_not),
    "aten.logical_or.default": lowered(_or),
    "aten.masked_fill.Scalar": lowered(_masked_fill),
    "aten.masked_fill.Tensor": lowered(_masked_fill),
    "aten.maximum.default": lowered(_compare(Binary.MAX)),
    "aten.minimum.default": lowered(_compare(Binary.MIN)),
    "aten.ne.Scalar": lowered(_not_equal),
    "aten.ne.Tensor": lowered(_not_equal),
    "aten.sgn.default": lowered(_sign),
    "aten.sign.default": lowered(_sign),
    "aten.where.self": lowered(_where),
}
