"""Convolutions in one or two dimensions, transposed ones too."""

from dataclasses import dataclass, replace
from typing import Any

from samestep.kernels.aten.linear import summed
from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NONE, Buffer, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import (
    Activation,
    Parameter,
    SampleSum,
    Written,
)


WEIGHT, BIAS = 15, 16
"""Where the places of gradients stand among the numbers."""
SUMS = 512
"""Sums that the gradient of a weight keeps for each sample: CONV_SUMS in the header."""


@dataclass(frozen=True)
class Convolution:
    """The numbers of a convolution, height before width.

    A transposed one is the gradient of that one's inputs: `images` are its results.
    """

    is_transposed: bool
    channels: tuple[int, int]
    """The channels of the images and of the results."""
    groups: int
    images: tuple[int, int]
    """Their pixels."""
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def numbers(self) -> list[int]:
        """Return them as operations take them."""
        pairs = self.images, self.kernel, self.stride, self.padding, self.dilation
        return [*self.channels, self.groups, *(n for pair in pairs for n in pair)]

    @property
    def results(self) -> tuple[int, int]:
        """The pixels of the results."""
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                *(self.images, self.kernel, self.stride, self.padding, self.dilation),
                strict=True,
            )
        )
        return height, width


def _recognised(
    x: Value, y: Value, weight: Value, settings: list[Any]
) -> Convolution | None:
    """Return the convolution that maps x [b, c, (h,) w] to y; None if none is known."""
    stride, padding, dilation, is_transposed, _, groups = settings
    images, results = (y, x) if is_transposed else (x, y)
    if len(x.shape) not in (3, 4):
        return None
    pixels = [_pair(value.shape[2:], 1) for value in (images, results, weight)]
    found = Convolution(
        *(is_transposed, (images.shape[1], results.shape[1]), groups),
        *(pixels[0], pixels[2], _pair(stride, 1), _pair(padding, 0)),
        _pair(dilation, 1),
    )
    return found if found.results == pixels[1] else None


def _pair(sizes: Any, default: int) -> tuple[int, int]:
    """Return numbers of one or two dimensions as those of height and width."""
    height, width = sizes if len(sizes) == 2 else (default, sizes[0])
    return height, width


def _images(lowering: Lowering, x: Any) -> Activation | None:
    """Return images [samples, ...] alone in a buffer; None if they are no such."""
    if not isinstance(x, Activation):
        return None
    samples = [axis for axis in x.dims[0] if axis.size > 1]
    return lowering.whole(x) if [a.stride for a in samples] == [None] else None


def _is_plain(weight: Parameter) -> bool:
    """Return whether a view of a weight is the weight itself."""
    return weight.offset == 0 and weight.axes in ([], [Axis(weight.size, 1)])


def _convolution(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [x, Parameter() as weight, None | Parameter() as bias, *settings]:
            images, y = _images(lowering, x), node.outputs[0]
            conv = _recognised(node.arguments[0], y, node.arguments[1], settings)
            if images is None or conv is None or not _is_plain(weight):
                return None
            offset = NONE if bias is None else lowering.place(bias)
            return [_apply(lowering, conv, images, y, weight, offset)]
    return None


def _apply(
    lowering: Lowering,
    conv: Convolution,
    x: Activation,
    value: Value,
    weight: Parameter,
    bias: int,
) -> Activation:
    """Append what maps x to a new activation of the shape of `value`."""
    y = lowering.activation(value.shape)
    i = [x.buffer, y.buffer, *conv.numbers, lowering.place(weight)]
    op = Op(OpKind.CONV, [*i, bias, 0], [0.0])
    if conv.is_transposed:
        op = Op(OpKind.CONV_GRAD_INPUT, [*i, NONE, bias], [1.0])
    lowering.ops.append(op)
    return y


def _convolution_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [dy, x, Parameter() as weight, _, *settings, [*wanted]]:
            gradient, images = _images(lowering, dy), _images(lowering, x)
            of_results, of_images, of_weight, *_ = node.arguments
            conv = _recognised(of_images, of_results, of_weight, settings)
            if gradient is None or images is None or conv is None:
                return None
            if not _is_plain(weight):
                return None
            results: list[Any] = _parameters(lowering, conv, gradient, images, wanted)
            if wanted[0]:
                conv = replace(conv, is_transposed=not conv.is_transposed)
                i = lowering, conv, gradient, of_images, weight, NONE
                results.insert(0, _apply(*i))
            return results
    return None


def _parameters(
    lowering: Lowering,
    conv: Convolution,
    dy: Activation,
    x: Activation,
    wanted: list[bool],
) -> list[Any]:
    """Append the gradients of weight and bias that are wanted, and return them."""
    if not any(wanted[1:]):
        return []
    lowering.buffers.append(Buffer(SUMS))
    first, second = (x, dy) if conv.is_transposed else (dy, x)
    i = [first.buffer, second.buffer, *conv.numbers, NONE, NONE]
    op = Op(OpKind.CONV_GRAD_WEIGHT, [*i, len(lowering.buffers) - 1, NONE])
    bias: Written | SampleSum | Activation = Written(op, BIAS)
    if wanted[1] or not conv.is_transposed:
        lowering.ops.append(op)
    if wanted[2] and conv.is_transposed:
        others = [dim for dim in range(len(dy.dims)) if dim != 1]
        bias = summed(lowering, dy, others)
    gradients = [Written(op, WEIGHT), bias]
    return [g for g, is_wanted in zip(gradients, wanted[1:], strict=True) if is_wanted]


LOWERINGS: Lowerings = {
    "aten.convolution.default": _convolution,
    "aten.convolution_backward.default": _convolution_backward,
}
