"""BatchNorm of features and of images, with their statistics."""

from dataclasses import dataclass, replace
from typing import Any

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NO_FLAGS, NONE, Buffer, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Normalised,
    NormGradient,
    Parameter,
)


@dataclass(frozen=True)
class ImageNorm:
    """What the backward pass needs of a batch norm of images."""

    x: Activation
    """[samples, channels, ...]"""
    order: tuple[Axis, ...]
    """The axes of the first dimension before."""
    statistics: list[int]
    """The buffers of means and inverse deviations."""
    numbers: list[int]
    """Channels, pixels, and the offsets of weight and bias."""


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
            len(x.dims) == 2
            and x.samples_dim == 0
            and len(x.dims[0]) == 1
            and mean in lowering.places.buffers
            and (training or not lowering.trace.gradients)
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
        case [Activation(), *_] if arguments[3] is None or isinstance(
            arguments[3], Parameter
        ):
            return _image_norm(lowering, node, arguments)
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
        case [Activation(), _, _, _, _, ImageNorm() as images, *_]:
            return _image_norm_backward(lowering, node, arguments, images)
    return None


def _image_norm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Append the norm of images; its arguments are those of `native_batch_norm`."""
    x, weight, bias, mean, variance, training, momentum, eps = arguments
    if x.samples_dim != 0 or len(x.dims) < 2:
        return None
    if mean is not None and mean.name not in lowering.places.buffers:
        return None
    if lowering.trace.gradients and not training:
        return None  # of a formula, which has a gradient
    if training and mean is None and not lowering.trace.gradients:
        return None  # statistics of an evaluation's batch, which means nothing
    order = x.dims[0]
    x = lowering.whole(_by_sample(x))
    channels = x.shape[1]
    numbers = [channels, x.rows // channels, *_offsets(lowering, weight, bias)]
    buffers = [NONE, NONE]
    if training:
        shape = (x.shape[0], channels)
        buffers = [lowering.activation(shape).buffer for _ in range(2)]
    running = [
        NONE if p is None else lowering.places.buffers[p.name] for p in (mean, variance)
    ]
    y = lowering.like(x.dims)
    i = [x.buffer, y.buffer, *buffers, *numbers, *running, NONE]
    op = Op(OpKind.BATCH_NORM_2D, i, [eps, momentum])
    op.flags = NO_FLAGS if training else OpFlag.EVAL
    lowering.ops.append(op)
    saved = ImageNorm(x, order, buffers, numbers)
    return [_as_before(y, order), saved, saved]


def _image_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any], saved: ImageNorm
) -> Results:
    """Append its gradients; its arguments are those of `native_batch_norm_backward`."""
    *_, mask = arguments
    x, outputs = saved.x, iter(node.outputs)
    of_x, *of_parameters = [next(outputs) if part else None for part in mask]
    dy, dx = lowering.whole(_by_sample(arguments[0])), lowering.like(x.dims)
    room = lowering.activation((x.shape[0], 2 * saved.numbers[0]))
    gradients = {v: n for n, v in lowering.trace.gradients.items()}
    written = [
        lowering.places.parameters[gradients[value]] if value in gradients else NONE
        for value in of_parameters
    ]
    i = [dy.buffer, dx.buffer, NONE, x.buffer, *saved.statistics]
    i += [room.buffer, *saved.numbers, *written]
    lowering.ops.append(Op(OpKind.BATCH_NORM_2D_GRAD, i))
    results: list[Any] = [] if of_x is None else [_as_before(dx, saved.order)]
    return results + [NormGradient()] * (len(node.outputs) - len(results))


def _by_sample(x: Activation) -> Activation:
    """Return [positions and samples, channels, ...] with the positions last."""
    first, *others = x.dims
    samples = tuple(axis for axis in first if axis.stride is None)
    positions = tuple(axis for axis in first if axis.stride is not None)
    return replace(x, dims=(samples, *others, positions))


def _as_before(x: Activation, order: tuple[Axis, ...]) -> Activation:
    """Return what `_by_sample` made of axes of this order as it was."""
    samples, *others, positions = x.dims
    left = iter(positions)
    first = tuple(samples[0] if a.stride is None else next(left) for a in order)
    return replace(x, dims=(first, *others))


def _offsets(lowering: Lowering, *parameters: Parameter | None) -> list[int]:
    return [NONE if p is None else lowering.place(p) for p in parameters]


LOWERINGS: Lowerings = {
    "aten.native_batch_norm.default": _batch_norm,
    "aten.native_batch_norm_backward.default": _batch_norm_backward,
}
