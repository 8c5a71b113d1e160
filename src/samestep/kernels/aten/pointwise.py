"""Arithmetic of tensors, element by element."""

from collections.abc import Callable
from typing import Any

from samestep.kernels.interface import Binary
from samestep.kernels.lowering import (
    Activation,
    Lowering,
    Lowerings,
    Opaque,
    Parameter,
    Results,
)
from samestep.kernels.trace import Node


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


COMMUTING = (Binary.ADD, Binary.MUL)


def _add_(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() | Opaque(), int()]:  # a counter
            return [Opaque()]
    return arithmetic(Binary.ADD)(lowering, node, arguments)


LOWERINGS: Lowerings = {
    "aten.add.Tensor": arithmetic(Binary.ADD),
    "aten.add_.Tensor": _add_,
    "aten.div.Scalar": arithmetic(Binary.DIV),
    "aten.div.Tensor": arithmetic(Binary.DIV),
    "aten.mul.Scalar": arithmetic(Binary.MUL),
    "aten.sub.Tensor": arithmetic(Binary.SUB),
}
