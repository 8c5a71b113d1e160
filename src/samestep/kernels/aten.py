"""The lowerings of ATen operations, by their names in LOWERINGS.

A function takes what the arguments of an operation became, and appends operations of
the program or says what the result stands for: much of a recording is views, which need
no operation. To add an operation, add a function here and, if it computes something
new, a kernel (CONTRIBUTING.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Activation,
    BiasGradient,
    Lowering,
    Mask,
    Normalised,
    NormGradient,
    Ones,
    Opaque,
    Parameter,
    WeightGradient,
)
from samestep.kernels.program import NO_FLAGS, NONE, Buffer, Op
from samestep.kernels.trace import Node


Results = list[Any] | None
"""What the outputs of an operation became; None: there is no kernel."""


def _same(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [arguments[0]]


def _opaque(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Opaque()] * len(node.outputs)


def _view(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0], node.outputs[0].shape:
        case Activation(_, features, False), (lowering.trace.samples, n) if (
            n == features
        ):
            return [arguments[0]]
        case ((BiasGradient() as gradient), (n,)) if n == gradient.gradient.features:
            return [gradient]
    return None


def _transpose(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0]:
        case Activation() | Parameter() as matrix:
            return [replace(matrix, is_transposed=not matrix.is_transposed)]
        case WeightGradient(gradient, inputs):
            return [WeightGradient(inputs, gradient)]
    return None


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


def _sum(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(is_transposed=False) as dy, [0], *_]:
            return [BiasGradient(dy)]
    return None


def _batch_norm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Activation(is_transposed=False) as x,
            Parameter(weight),
            Parameter(bias),
            Parameter(mean),
            Parameter(variance),
            bool(training),
            float(momentum),
            float(eps),
        ]:
            y, z = lowering.activation(x.features), lowering.activation(x.features)
            lowering.buffers.append(Buffer(x.features, is_by_micro_batch=True))
            saved = Normalised(z.buffer, len(lowering.buffers) - 1, eps)
            parameters, buffers = lowering.places.parameters, lowering.places.buffers
            vectors = [parameters[weight], parameters[bias]]
            running = [buffers[mean], buffers[variance]]
            i = [x.buffer, y.buffer, saved.buffer, saved.inverse, x.features]
            i += [*vectors, *running, *running, 0]
            op = Op(OpKind.BATCH_NORM, i, [eps, momentum, 0.0])
            op.flags = NO_FLAGS if training else OpFlag.EVAL
            lowering.ops.append(op)
            return [y, saved, saved]
    return None


def _batch_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [
            Activation() as dy,
            _,
            Parameter(weight),
            _,
            _,
            Normalised() as saved,
            *_,
        ]:
            dx = lowering.activation(dy.features)
            gradients = {v: n for n, v in lowering.trace.gradients.items()}
            places = lowering.places.parameters
            written = [
                places[gradients[value]] if value in gradients else NONE
                for value in node.outputs[1:]
            ]
            i = [dy.buffer, dx.buffer, NONE, saved.buffer, saved.inverse, dy.features]
            i += [places[weight], *written]
            lowering.ops.append(Op(OpKind.BATCH_NORM_GRAD, i, [1.0]))
            return [dx, NormGradient(), NormGradient()]
    return None


LOWERINGS: Mapping[str, Callable[[Lowering, Node, list[Any]], Results]] = {
    "aten._unsafe_view.default": _view,
    "aten.add_.Tensor": _opaque,
    "aten.addmm.default": _addmm,
    "aten.bernoulli_.float": _bernoulli,
    "aten.detach.default": _same,
    "aten.div_.Scalar": _div,
    "aten.empty.memory_format": _opaque,
    "aten.empty_like.default": _ones,
    "aten.mm.default": _mm,
    "aten.mul.Tensor": _mul,
    "aten.native_batch_norm.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
    "aten.ones.default": _ones,
    "aten.ones_like.default": _ones,
    "aten.relu.default": _relu,
    "aten.sum.dim_IntList": _sum,
    "aten.t.default": _transpose,
    "aten.threshold_backward.default": _threshold_backward,
    "aten.view.default": _view,
}
