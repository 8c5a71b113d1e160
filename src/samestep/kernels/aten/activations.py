"""Activations and dropout."""

from dataclasses import replace
from typing import Any

from samestep.kernels.aten.pointwise import arithmetic
from samestep.kernels.interface import Binary, OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import Op
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Constant,
    Mask,
    Ones,
)


def _relu(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x]:
            return [_activate(lowering, x, OpFlag.RELU, Mask(0, 0.0))]
    return None


def _activate(
    lowering: Lowering, x: Activation, flags: OpFlag, mask: Mask
) -> Activation:
    x = lowering.whole(x)
    y = lowering.like(x.dims)
    i = [x.buffer, y.buffer, x.rows, mask.stream]
    lowering.ops.append(Op(OpKind.ACTIVATE, i, [mask.probability], flags))
    return y


def _ones(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Ones()]


def _bernoulli(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    kept = arguments[1] if len(arguments) > 1 else 0.5  # the default is left out
    shape = node.outputs[0].shape
    of_samples = (n for n, s in enumerate(shape) if s % lowering.trace.samples == 0)
    lowering.mask_dims.append(next(of_samples, 0))
    lowering.streams += 1
    return [Mask(lowering.streams - 1, 1 - kept, is_scaled=False)]


def _div_mask(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Mask(probability=p) as mask, float(kept)] if p == 1 - kept:
            return [replace(mask, is_scaled=True)]
        case [Mask(probability=p) as mask, Constant(data=kept)] if (
            kept.numel() == 1 and p == 1 - float(kept)
        ):
            return [replace(mask, is_scaled=True)]
    return None


def _mul(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x, Mask(is_scaled=True) as mask]:
            return [_activate(lowering, x, OpFlag.DROPOUT, mask)]
        case [Ones(), Mask() as mask]:
            return [mask]
    return arithmetic(Binary.MUL)(lowering, node, arguments)


def _threshold_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [Activation() as dy, Activation() as y, 0] if dy.shape == y.shape:
            dy, y = lowering.whole(dy), lowering.whole(y)
            dx = lowering.like(dy.dims)
            i = [dy.buffer, dx.buffer, y.buffer, dy.rows]
            lowering.ops.append(Op(OpKind.GATE, i, [1.0]))
            return [dx]
    return None


LOWERINGS: Lowerings = {
    "aten.bernoulli_.float": _bernoulli,
    "aten.div_.Scalar": _div_mask,
    "aten.div_.Tensor": _div_mask,
    "aten.empty_like.default": _ones,
    "aten.mul.Tensor": _mul,
    "aten.new_empty.default": _ones,
    "aten.ones.default": _ones,
    "aten.ones_like.default": _ones,
    "aten.relu.default": _relu,
    "aten.threshold_backward.default": _threshold_backward,
}
