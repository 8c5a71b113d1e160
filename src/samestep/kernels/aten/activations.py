"""Activations and dropout."""

from typing import Any

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Activation,
    Lowering,
    Lowerings,
    Mask,
    Ones,
    Results,
)
from samestep.kernels.program import Op
from samestep.kernels.trace import Node


def _relu(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x]:
            return [_activate(lowering, x, OpFlag.RELU, Mask(0, 0.0))]
    return None


def _activate(
    lowering: Lowering, x: Activation, flags: OpFlag, mask: Mask
) -> Activation:
    y = lowering.activation(x.features)
    i = [x.buffer, y.buffer, x.features, mask.stream]
    lowering.ops.append(Op(OpKind.ACTIVATE, i, [mask.probability], flags))
    return y


def _ones(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Ones()]


def _bernoulli(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    kept = arguments[1] if len(arguments) > 1 else 0.5  # the default is left out
    lowering.streams += 1
    return [Mask(lowering.streams - 1, 1 - kept)]


def _div(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Mask(probability=p) as mask, kept] if p == 1 - kept:
            return [mask]
    return None


def _mul(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as x, Mask() as mask]:
            return [_activate(lowering, x, OpFlag.DROPOUT, mask)]
        case [Ones(), Mask() as mask]:
            return [mask]
    return None


def _threshold_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [Activation() as dy, Activation() as y, 0]:
            dx = lowering.activation(dy.features)
            i = [dy.buffer, dx.buffer, y.buffer, dy.features]
            lowering.ops.append(Op(OpKind.GATE, i, [1.0]))
            return [dx]
    return None


LOWERINGS: Lowerings = {
    "aten.bernoulli_.float": _bernoulli,
    "aten.div_.Scalar": _div,
    "aten.empty_like.default": _ones,
    "aten.mul.Tensor": _mul,
    "aten.ones.default": _ones,
    "aten.ones_like.default": _ones,
    "aten.relu.default": _relu,
    "aten.threshold_backward.default": _threshold_backward,
}
