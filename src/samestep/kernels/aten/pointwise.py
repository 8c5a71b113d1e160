"""Arithmetic of tensors, element by element."""

from collections.abc import Callable
from typing import Any

from samestep.kernels.interface import Binary, Unary
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    GradientSum,
    Opaque,
    Parameter,
    SampleSum,
    TableGradient,
    WeightGradient,
)


def arithmetic(
    function: Binary,
) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers an operation of two tensors, or of a tensor and a number."""

    def lowered(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        match arguments:
            case [
                Activation() as a,
                (Activation() | Parameter() | int() | float()) as b,
            ]:
                result = lowering.binary(function, a, b)
                return None if result is None else [result]
            case [Parameter() as a, Activation() as b] if function in COMMUTING:
                result = lowering.binary(function, b, a)
                return None if result is None else [result]
        return None

    return lowered


def function(number: Unary) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers a function of one tensor."""

    def lowered(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        match arguments:
            case [Activation() as x]:
                return [lowering.unary(number, x)]
        return None

    return lowered


def gradient(number: Binary) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers the gradient of a function, of `dy` and of x or y."""

    def lowered(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        match arguments:
            case [Activation() as dy, Activation() as other]:
                result = lowering.binary(number, dy, other)
                return None if result is None else [result]
        return None

    return lowered


def _gelu(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [x, {"approximate": "tanh"}]:
            return function(Unary.GELU_TANH)(lowering, node, [x])
        case [x, {"approximate": "none"}] | [x]:
            return function(Unary.GELU)(lowering, node, [x])
    return None


def _gelu_backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [dy, x, {"approximate": "tanh"}]:
            return gradient(Binary.GELU_TANH_GRAD)(lowering, node, [dy, x])
        case [dy, x, {"approximate": "none"}] | [dy, x]:
            return gradient(Binary.GELU_GRAD)(lowering, node, [dy, x])
    return None


COMMUTING = (Binary.ADD, Binary.MUL)
NAMED = (
    *(Unary.NEG, Unary.ABS, Unary.RECIPROCAL, Unary.SQRT, Unary.RSQRT, Unary.EXP),
    *(Unary.LOG, Unary.TANH, Unary.SIGMOID, Unary.ERF, Unary.SIN, Unary.COS),
    Unary.SILU,
)
"""Functions that ATen calls the same."""


def _add(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Add tensors, or the gradients of the uses of one parameter."""
    match arguments:
        case [
            (WeightGradient() | SampleSum() | TableGradient() | GradientSum()) as a,
            (WeightGradient() | SampleSum() | TableGradient()) as b,
        ] if lowering.gradient is not None:
            before = a.parts if isinstance(a, GradientSum) else (a,)
            return [GradientSum((*before, b))]
    return arithmetic(Binary.ADD)(lowering, node, arguments)


def _add_(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() | Opaque(), int()]:  # a counter
            return [Opaque()]
    return _add(lowering, node, arguments)


LOWERINGS: Lowerings = {
    "aten.add.Tensor": _add,
    "aten.add_.Tensor": _add_,
    "aten.div.Scalar": arithmetic(Binary.DIV),
    "aten.div.Tensor": arithmetic(Binary.DIV),
    "aten.gelu.default": _gelu,
    "aten.gelu_backward.default": _gelu_backward,
    "aten.mul.Scalar": arithmetic(Binary.MUL),
    "aten.sigmoid_backward.default": gradient(Binary.SIGMOID_GRAD),
    "aten.silu_backward.default": gradient(Binary.SILU_GRAD),
    "aten.sub.Tensor": arithmetic(Binary.SUB),
    "aten.tanh_backward.default": gradient(Binary.TANH_GRAD),
    **{f"aten.{number.name.lower()}.default": function(number) for number in NAMED},
}
