"""Pooling of images: maxima and means of windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Dims
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Opaque,
)


ADAPTIVE = ([0, 0], [0, 0], [0, 0], [1, 1])
"""The windows of adaptive pooling: their number says where they are."""


@dataclass(frozen=True)
class Pixels(Opaque):
    """The pixels that a maximum was taken from, and what its windows were."""

    buffer: int
    dims: Dims
    """The dimensions of the images."""
    windows: list[int]


def _windows(
    x: Activation, out: Sequence[int], numbers: Sequence[Sequence[int]]
) -> list[int] | None:
    """Return planes and both axes as `OP_MAX_POOL` takes them.

    `numbers` are kernel, stride, padding and dilation. None if samples are among the
    pixels, or a window has none.
    """
    *_, height, width = x.shape
    if any(axis.stride is None for dim in x.dims[-2:] for axis in dim):
        return None
    windows = [x.rows // (height * width)]
    for n, size in enumerate((height, width)):
        own = [number[n % len(number)] for number in numbers]
        kernel, _, padding, dilation = own
        if kernel and padding and dilation > size:
            return None
        windows += [size, out[n], *own]
    return windows


def _usual(arguments: list[Any]) -> tuple[list[list[int]], list[Any]]:
    """Return kernel, stride and padding, and the arguments after them."""
    kernel, stride, padding = [*arguments, *([], [0, 0])[len(arguments) - 1 :]][:3]
    return [kernel, stride or kernel, padding], arguments[3:]


def _max_pool(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    numbers, rest = _usual(arguments[1:])
    dilation = rest[0] if rest else [1, 1]
    return _take_maximum(lowering, node, arguments[0], (*numbers, dilation))


def _adaptive_max_pool(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return _take_maximum(lowering, node, arguments[0], ADAPTIVE)


def _take_maximum(
    lowering: Lowering, node: Node, x: Any, numbers: Sequence[Sequence[int]]
) -> Results:
    if not isinstance(x, Activation):
        return None
    x = lowering.whole(x)
    windows = _windows(x, node.outputs[0].shape[-2:], numbers)
    if windows is None:
        return None
    y, where = lowering.activation(node.outputs[0].shape), NONE
    if lowering.trace.gradients:
        where = lowering.like(y.dims).buffer
    lowering.ops.append(Op(OpKind.MAX_POOL, [x.buffer, y.buffer, where, *windows]))
    return [y, Pixels(where, x.dims, windows)]


def _max_pool_backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as dy, *_, Pixels() as pixels]:
            dy, dx = lowering.whole(dy), lowering.like(pixels.dims)
            i = [dy.buffer, dx.buffer, pixels.buffer, *pixels.windows]
            lowering.ops.append(Op(OpKind.MAX_POOL_GRAD, i))
            return [dx]
    return None


def _mean_pool(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    windows, divisor = _mean_windows(arguments[1:])
    return _take_means(lowering, node, arguments[0], windows, divisor)


def _mean_windows(arguments: list[Any]) -> tuple[list[list[int]], int]:
    """Return the numbers of the windows, and what a sum is divided by.

    The arguments after the tensors are those of `avg_pool2d`.
    """
    numbers, rest = _usual(arguments)
    left_out: list[Any] = [False, True, None]
    _, with_padding, divisor = [*rest, *left_out[len(rest) :]]
    return [*numbers, [1, 1]], divisor or (-1 if with_padding else 0)


def _adaptive_mean_pool(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    return _take_means(lowering, node, arguments[0], ADAPTIVE, 0)


def _take_means(
    lowering: Lowering,
    node: Node,
    x: Any,
    numbers: Sequence[Sequence[int]],
    divisor: int,
) -> Results:
    if not isinstance(x, Activation):
        return None
    x = lowering.whole(x)
    windows = _windows(x, node.outputs[0].shape[-2:], numbers)
    if windows is None:
        return None
    y = lowering.activation(node.outputs[0].shape)
    i = [x.buffer, y.buffer, NONE, *windows, divisor]
    lowering.ops.append(Op(OpKind.MEAN_POOL, i))
    return [y]


def _mean_pool_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    numbers, divisor = _mean_windows(arguments[2:])
    return _give_means(lowering, arguments, numbers, divisor)


def _adaptive_mean_pool_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    return _give_means(lowering, arguments, ADAPTIVE, 0)


def _give_means(
    lowering: Lowering,
    arguments: list[Any],
    numbers: Sequence[Sequence[int]],
    divisor: int,
) -> Results:
    match arguments:
        case [Activation() as dy, Activation() as x, *_]:
            dy, dx = lowering.whole(dy), lowering.like(x.dims)
            windows = _windows(dx, dy.shape[-2:], numbers)
            if windows is None:
                return None
            i = [dy.buffer, dx.buffer, NONE, *windows, divisor]
            lowering.ops.append(Op(OpKind.MEAN_POOL_GRAD, i))
            return [dx]
    return None


LOWERINGS: Lowerings = {
    "aten._adaptive_avg_pool2d.default": _adaptive_mean_pool,
    "aten._adaptive_avg_pool2d_backward.default": _adaptive_mean_pool_backward,
    "aten.adaptive_max_pool2d.default": _adaptive_max_pool,
    "aten.adaptive_max_pool2d_backward.default": _max_pool_backward,
    "aten.avg_pool2d.default": _mean_pool,
    "aten.avg_pool2d_backward.default": _mean_pool_backward,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool2d_with_indices_backward.default": _max_pool_backward,
}
