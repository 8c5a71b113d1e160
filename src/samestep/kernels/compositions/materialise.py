"""Masks and repeated parameters as activations, where an operation needs them so."""

from dataclasses import replace
from typing import Any

from samestep.kernels.compositions.formula import Mismatch
from samestep.kernels.interface import Binary, OpFlag, OpKind, Unary
from samestep.kernels.lowering import (
    Lowering,
)
from samestep.kernels.program import Op
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import (
    Activation,
    Constant,
    Integers,
    Mask,
    Parameter,
)


SCALING = ("aten.div_.Scalar", "aten.div_.Tensor")
"""Operations that make a mask of zeros and ones the factors of a dropout."""


def masks(lowering: Lowering, node: Node, arguments: list[Any]) -> list[Any]:
    """Return the arguments with masks as activations that are not of the others' shape.

    Such a mask drops more than one element by a number: a channel, or a whole sample.
    """
    values = [v for v in node.arguments if isinstance(v, Value)]
    shapes = {value.shape for value in values}
    if len(shapes) < 2 or node.op in SCALING:
        return arguments
    return all_masks(lowering, node, arguments)


def all_masks(lowering: Lowering, node: Node, arguments: list[Any]) -> list[Any]:
    """Return the arguments with all masks as activations."""
    return [
        _mask(lowering, value, result) if isinstance(result, Mask) else result
        for value, result in zip(node.arguments, arguments, strict=True)
    ]


def numbers(lowering: Lowering, arguments: Any) -> Any:
    """Return arguments with integers as floats, which are exact up to 2^24."""
    if isinstance(arguments, list):
        return [numbers(lowering, argument) for argument in arguments]
    if not isinstance(arguments, Integers):
        return arguments
    x = Activation(
        arguments.buffer, arguments.rows, dims=arguments.dims, offset=arguments.offset
    )
    return lowering.unary(Unary.FROM_INT, x)


def integers(lowering: Lowering, x: Any) -> Integers:
    """Return integers in a buffer of their own, of floats cut off. Raises Mismatch."""
    if isinstance(x, Integers):
        rows = Activation(x.buffer, x.rows, dims=x.dims, offset=x.offset)
        whole = lowering.whole(rows)
    elif isinstance(x, Activation):
        whole = lowering.whole(lowering.unary(Unary.TO_INT, x))
    else:
        raise Mismatch
    return Integers(whole.buffer, whole.rows, dims=whole.dims)


def _mask(lowering: Lowering, value: Value, mask: Mask) -> Activation:
    ones = lowering.unary(Unary.FILL, lowering.activation(value.shape), [1.0])
    ones, y = lowering.whole(ones), lowering.activation(value.shape)
    i = [ones.buffer, y.buffer, y.rows, mask.stream]
    lowering.ops.append(Op(OpKind.ACTIVATE, i, [mask.probability], OpFlag.DROPOUT))
    if not mask.is_scaled:
        kept = lowering.binary(Binary.GREATER, y, 0.0)
        assert kept is not None
        y = kept
    lowering.known[value] = y
    return y


def parameters(lowering: Lowering, arguments: Any, every: bool = False) -> Any:
    """Return arguments with parameters as activations that samples repeat.

    These are parameters whose shape has the samples, or with `every` all of them.
    """
    if isinstance(arguments, list):
        return [parameters(lowering, argument, every) for argument in arguments]
    samples = lowering.trace.samples
    if not isinstance(arguments, Parameter) or not (
        every or lowering.has_samples(arguments.shape)
    ):
        return arguments
    is_constant = isinstance(arguments, Constant)
    if not is_constant and arguments.name not in lowering.places.parameters:
        return arguments  # a buffer, which changes
    zeros = lowering.zeros(arguments.shape)
    dims = tuple(
        tuple(axis for axis in dim if axis.size != samples) for dim in arguments.dims
    )
    shared = replace(arguments, dims=dims)
    result = lowering.binary(Binary.ADD, zeros, shared)
    return arguments if result is None else result
