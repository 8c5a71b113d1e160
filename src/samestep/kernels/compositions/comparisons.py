"""Comparisons, which give 1 or 0, and what chooses by them."""

from collections.abc import Callable
from typing import Any

import torch

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


def _of_truths(own: Callable[..., Activation]) -> Callable[..., Activation]:
    """Return an operation of truth values; integers have other bits."""

    def combine(formula: Formula, *operands: Any) -> Activation:
        if formula.node.outputs[0].dtype != torch.bool:
            raise Mismatch
        return own(formula, *operands)

    return combine


def _logical(own: Callable[..., Activation]) -> Callable[..., Activation]:
    """Return the same of numbers, which are true unless they are 0."""

    def combine(formula: Formula, *operands: Any) -> Activation:
        truths = [
            x if value.dtype == torch.bool else _not(formula, _not(formula, x))
            for x, value in zip(operands, formula.node.arguments, strict=True)
        ]
        return own(formula, *truths)

    return combine


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


def _clamp_tensors(formula: Formula, x: Any, low: Any, high: Any = None) -> Activation:
    bounds = ((low, Binary.MAX), (high, Binary.MIN))
    for bound, function in bounds:
        if bound is not None:
            x = formula.binary(function, x, bound)
    return activation(x)


def _clamp_max(formula: Formula, x: Any, high: float) -> Activation:
    return formula.binary(Binary.MIN, x, high)


def _sign(formula: Formula, x: Any) -> Activation:
    above = formula.binary(Binary.GREATER, x, 0.0)
    return formula.sub(above, formula.binary(Binary.LESS, x, 0.0))


def _converted(formula: Formula, x: Any, options: Any = None) -> Activation:
    """Return a tensor as another type; float64 and types of 16 bits have no kernel."""
    kind = (options or {}).get("dtype", torch.float32)
    if kind == torch.bool:
        return _not(formula, _not(formula, x))
    before = formula.node.arguments[0].dtype
    if kind.is_floating_point == before.is_floating_point or kind == torch.float32:
        if kind in (torch.float32, torch.int64, torch.int32):
            return activation(x)
        raise Mismatch
    if kind not in (torch.int64, torch.int32):
        raise Mismatch
    whole = formula.unary(Unary.TO_INT, x)
    return formula.unary(Unary.FROM_INT, whole)


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
    "aten._to_copy.default": lowered(_converted),
    "aten.bitwise_and.Tensor": lowered(_of_truths(_and)),
    "aten.bitwise_not.default": lowered(_of_truths(_not)),
    "aten.bitwise_or.Tensor": lowered(_of_truths(_or)),
    "aten.clamp.Tensor": lowered(_clamp_tensors),
    "aten.clamp.default": lowered(_clamp),
    "aten.clamp_max.default": lowered(_clamp_max),
    "aten.clamp_min.Tensor": lowered(_clamp_tensors),
    "aten.clamp_min.default": lowered(_clamp),
    "aten.hardtanh.default": lowered(
        lambda formula, x, low=-1.0, high=1.0: _clamp(formula, x, low, high)
    ),
    "aten.logical_and.default": lowered(_logical(_and)),
    "aten.logical_not.default": lowered(_logical(_not)),
    "aten.logical_or.default": lowered(_logical(_or)),
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
