"""BatchNorm of images, [b, channels, ...], with statistics over samples and pixels."""

from dataclasses import dataclass
from typing import Any

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Activation,
    Lowering,
    NormGradient,
    Parameter,
    Results,
)
from samestep.kernels.program import NO_FLAGS, NONE, Op
from samestep.kernels.trace import Node


@dataclass(frozen=True)
class ImageNorm:
    """What the backward pass needs of a batch norm of images."""

    x: Activation
    statistics: list[int]
    """The buffers of means and inverse deviations."""
    numbers: list[int]
    """Channels, pixels, and the offsets of weight and bias."""


def batch_norm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Append the norm of images; its arguments are those of `native_batch_norm`."""
    x, weight, bias, mean, variance, training, momentum, eps = arguments
    first, *others = x.dims
    if x.samples_dim != 0 or len(first) != 1 or not others:
        return None
    if mean is not None and mean.name not in lowering.places.buffers:
        return None
    if training and mean is None and not lowering.trace.gradients:
        return None  # statistics of an evaluation's batch, which means nothing
    x = lowering.whole(x)
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
    saved = ImageNorm(x, buffers, numbers)
    return [y, saved, saved]


def batch_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any], saved: ImageNorm
) -> Results:
    """Append its gradients; its arguments are those of `native_batch_norm_backward`."""
    *_, mask = arguments
    x, outputs = saved.x, iter(node.outputs)
    of_x, *of_parameters = [next(outputs) if part else None for part in mask]
    dy, dx = lowering.whole(arguments[0]), lowering.like(x.dims)
    room = lowering.activation((x.shape[0], 2 * saved.numbers[0]))
    gradients = {v: n for n, v in lowering.trace.gradients.items()}
    written = [
        lowering.places.parameters[gradients[value]] if value in gradients else NONE
        for value in of_parameters
    ]
    i = [dy.buffer, dx.buffer, NONE, x.buffer, *saved.statistics]
    i += [room.buffer, *saved.numbers, *written]
    lowering.ops.append(Op(OpKind.BATCH_NORM_2D_GRAD, i))
    results: list[Any] = [] if of_x is None else [dx]
    return results + [NormGradient()] * (len(node.outputs) - len(results))


def _offsets(lowering: Lowering, *parameters: Parameter | None) -> list[int]:
    return [NONE if p is None else lowering.place(p) for p in parameters]
