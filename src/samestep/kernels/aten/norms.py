"""Norms, with their statistics."""

from typing import Any

from samestep.kernels.aten import image_norms
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
            Activation() as x,
            Parameter() as weight,
            Parameter() as bias,
            Parameter(name=mean),
            Parameter(name=variance),
            bool(training),
            float(momentum),
            float(eps),
        ] if (
            len(x.dims) == 2 and x.samples_dim == 0 and mean in lowering.places.buffers
        ):
            x = lowering.whole(x)
            y, z = lowering.like(x.dims), lowering.like(x.dims)
            lowering.buffers.append(Buffer(x.rows, is_by_micro_batch=True))
            saved = Normalised(z.buffer, len(lowering.buffers) - 1, eps)
            buffers = lowering.places.buffers
            vectors = [lowering.place(weight), lowering.place(bias)]
            running = [buffers[mean], buffers[variance]]
            i = [x.buffer, y.buffer, saved.buffer, saved.inverse, x.rows]
            i += [*vectors, *running, *running, 0]
            op = Op(OpKind.BATCH_NORM, i, [eps, momentum, 0.0])
            op.flags = NO_FLAGS if training else OpFlag.EVAL
            lowering.ops.append(op)
            return [y, saved, saved]
        case [Activation(), *_]:
            return image_norms.batch_norm(lowering, node, arguments)
    return None


def _batch_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [
            Activation() as dy,
            _,
            Parameter() as weight,
            _,
            _,
            Normalised() as saved,
            *_,
        ]:
            dy = lowering.whole(dy)
            dx = lowering.like(dy.dims)
            gradients = {v: n for n, v in lowering.trace.gradients.items()}
            places = lowering.places.parameters
            written = [
                places[gradients[value]] if value in gradients else NONE
                for value in node.outputs[1:]
            ]
            i = [dy.buffer, dx.buffer, NONE, saved.buffer, saved.inverse, dy.rows]
            i += [lowering.place(weight), *written]
            lowering.ops.append(Op(OpKind.BATCH_NORM_GRAD, i, [1.0]))
            return [dx, NormGradient(), NormGradient()]
        case [Activation(), _, _, _, _, image_norms.ImageNorm() as images, *_]:
            return image_norms.batch_norm_backward(lowering, node, arguments, images)
    return None


LOWERINGS: Lowerings = {
    "aten.native_batch_norm.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
}
