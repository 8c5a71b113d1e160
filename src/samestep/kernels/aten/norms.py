"""Norms, with their statistics."""

from typing import Any

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Activation,
    Lowering,
    Lowerings,
    Normalised,
    NormGradient,
    Parameter,
    Results,
)
from samestep.kernels.program import NO_FLAGS, NONE, Buffer, Op
from samestep.kernels.trace import Node


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


LOWERINGS: Lowerings = {
    "aten.native_batch_norm.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
}
