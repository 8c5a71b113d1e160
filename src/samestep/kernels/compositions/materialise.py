"""Masks and repeated parameters as activations, where an operation needs them so."""

from dataclasses import replace
from typing import Any

from samestep.kernels.interface import Binary, OpFlag, OpKind, Unary
from samestep.kernels.lowering import (
    Lowering,
)
from samestep.kernels.program import Op
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import (
    Activation,
    Mask,
    Parameter,
)


def masks(lowering: Lowering, node: Node, arguments: list[Any]) -> list[Any]:
    """Return the arguments with masks as activations that are not of the others' shape.

    Such a mask drops more than one element by a number: a channel, or a whole sample.
    """
    values = [v for v in node.arguments if isinstance(v, Value)]
    shapes = {value.shape for value in values}
    if len(shapes) < 2:
        return arguments
    return [
        _mask(lowering, value, result) if isinstance(result, Mask) else result
        for value, result in zip(node.arguments, arguments, strict=True)
    ]


def _mask(lowering: Lowering, value: Value, mask: Mask) -> Activation:
    ones = lowering.unary(Unary.FILL, lowering.activation(value.shape), [1.0])
    ones, y = lowering.whole(ones), lowering.activation(value.shape)
    i = [ones.buffer, y.buffer, y.rows, mask.stream]
    lowering.ops.append(Op(OpKind.ACTIVATE, i, [mask.probability], OpFlag.DROPOUT))
    lowering.known[value] = y
    return y


def parameters(lowering: Lowering, arguments: Any) -> Any:
    """Return arguments with parameters as activations that samples repeat."""
    if isinstance(arguments, list):
        return [parameters(lowering, argument) for argument in arguments]
    samples = lowering.trace.samples
    if not isinstance(arguments, Parameter) or not any(
        size and size % samples == 0 for size in arguments.shape
    ):
        return arguments
    zeros = lowering.zeros(arguments.shape)
    dims = tuple(
        tuple(axis for axis in dim if axis.size != samples) for dim in arguments.dims
    )
    shared = replace(arguments, dims=dims)
    result = lowering.binary(Binary.ADD, zeros, shared)
    return arguments if result is None else result
