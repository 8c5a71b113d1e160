"""Linear layers: products, and the sums that are gradients of biases."""

from dataclasses import replace
from typing import Any

from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Activation,
    BiasGradient,
    Lowering,
    Lowerings,
    Parameter,
    Results,
    WeightGradient,
)
from samestep.kernels.program import NONE, Op
from samestep.kernels.trace import Node


def _addmm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Parameter(bias),
            Activation(is_transposed=False) as x,
            Parameter(name, True),
        ]:
            return [_linear(lowering, node, x, name, lowering.places.parameters[bias])]
    return None


def _mm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x, Parameter(name, True)]:
            return [_linear(lowering, node, x, name, NONE)]
        case [Activation(is_transposed=False) as x, Parameter(name, False)]:
            # Also the forward pass of a weight that is kept as [in, out].
            y = lowering.activation(node.outputs[0].shape[1])
            place = lowering.places.parameters[name]
            i = [x.buffer, y.buffer, y.features, x.features, place, NONE]
            lowering.ops.append(Op(OpKind.LINEAR_GRAD_INPUT, i, [1.0]))
            return [y]
        case [
            Activation(is_transposed=True) as x,
            Activation(is_transposed=False) as y,
        ]:
            return [WeightGradient(replace(x, is_transposed=False), y)]
    return None


def _linear(
    lowering: Lowering, node: Node, x: Activation, weight: str, bias: int
) -> Activation:
    y = lowering.activation(node.outputs[0].shape[1])
    place = lowering.places.parameters[weight]
    i = [x.buffer, y.buffer, x.features, y.features, place, bias, 0]
    lowering.ops.append(Op(OpKind.LINEAR, i, [0.0]))
    return y


def _sum(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as dy, [0], *_]:
            return [BiasGradient(dy)]
    return None


LOWERINGS: Lowerings = {
    "aten.addmm.default": _addmm,
    "aten.mm.default": _mm,
    "aten.sum.dim_IntList": _sum,
}
