"""Views, which need no operation of a program, copies, and what is ignored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.tensors import Axis, Strided
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    JoinedGradients,
    Mask,
    Opaque,
    SampleSum,
    WeightGradient,
    Written,
    Zeros,
)


def _same(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [arguments[0]]


def _to_float(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Truth values are floats already."""
    match arguments:
        case [Activation() as x]:
            return [x]
    return None


def _opaque(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Opaque()] * len(node.outputs)


def _zeros(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    return [Zeros()]


def _one(viewed: Strided | None) -> Results:
    return None if viewed is None else [viewed]


def _view(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    shape = node.outputs[0].shape
    match arguments[0]:
        case Activation() as x:
            viewed = x.view(shape) or lowering.whole(x).view(shape)
            return _one(viewed)
        case Strided() as tensor:
            return _one(tensor.view(shape))
        case SampleSum(rows):
            viewed = rows.view(shape)
            return None if viewed is None else [SampleSum(viewed)]
        case Mask() as mask if shape[0] % lowering.trace.samples == 0:
            return [mask]
        case WeightGradient() as gradient if _sizes(shape) == _sizes(gradient.shape):
            return [gradient]
        case Opaque() | Written() as result:
            return [result]
    return None


def _permuted(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Strided() as x, order]:
            return [x.permute([dim % len(x.dims) for dim in order])]
        case [SampleSum(rows), order]:
            return [SampleSum(rows.permute([dim % len(rows.dims) for dim in order]))]
        case [WeightGradient() as gradient, order]:
            sizes = node.arguments[0].shape
            moved = [dim % len(sizes) for dim in order if sizes[dim] > 1]
            return [gradient if moved == sorted(moved) else gradient.transposed]
    return None


def _sizes(shape: Sequence[int]) -> list[int]:
    """Return the sizes of dimensions but those of size 1, which hold no order."""
    return [size for size in shape if size > 1]


def _transpose(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    first, second = arguments[1:] or (0, -1)
    match arguments[0]:
        case Strided() as x:
            return [x.transpose(first, second) if len(x.dims) > 1 else x]
        case WeightGradient() as gradient if len(node.outputs[0].shape) == 2:
            return [gradient.transposed]
        case WeightGradient() as gradient:
            order = list(range(len(node.outputs[0].shape)))
            order[first], order[second] = order[second], order[first]
            return _permuted(lowering, node, [gradient, order])
        case SampleSum(rows) if len(rows.dims) > 1:
            return [SampleSum(rows.transpose(first, second))]
    return None


def _select(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Zeros(), *_]:
            return [arguments[0]]
        case [Strided() as x, int(dim), int(index)]:
            size = x.shape[dim]
            found = x.select(dim, index % size)
            if found is None and isinstance(x, Activation):
                found = lowering.whole(x).select(dim, index % size)
            return _one(found)
    return None


def _slice(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Strided() as x, *where]:
            defaults: list[Any] = [0, None, None, 1]
            dim, start, end, step = where + defaults[len(where) :]
            first, last, _ = slice(start, end).indices(x.shape[dim])
            found = x.slice(dim, first, last, step)
            if found is None and isinstance(x, Activation):
                found = lowering.whole(x).slice(dim, first, last, step)
            return _one(found)
    return None


def _parts(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Cut a dimension: split, chunk and their like."""
    match arguments:
        case [Strided() as x, _, *dims]:
            (dim,) = dims or (0,)
            start, parts = 0, list[Any]()
            for output in node.outputs:
                end = start + output.shape[dim]
                found = x.slice(dim, start, end)
                if found is None and isinstance(x, Activation):
                    x = lowering.whole(x)
                    found = x.slice(dim, start, end)
                parts.append(found)
                start = end
            return None if None in parts else parts
    return None


def _unbind(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Strided() as x, *dims]:
            (dim,) = dims or (0,)
            parts = [x.select(dim, index) for index in range(len(node.outputs))]
            return None if None in parts else parts
    return None


def _expand(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments[0]:
        case Activation(samples_dim=None) as x:
            return _one(_by_samples(lowering, x.expand(node.outputs[0].shape)))
        case Strided() as x:
            return _one(x.expand(node.outputs[0].shape))
    return None


def _by_samples(lowering: Lowering, x: Activation | None) -> Activation | None:
    """Return a view of what is the same for all samples, whose dimension it now has."""
    if x is None:
        return None
    whole = lowering.dims_of(x.shape)
    return replace(
        x,
        dims=tuple(
            made if any(axis.stride is None for axis in made) else dim
            for dim, made in zip(x.dims, whole, strict=True)
        ),
    )


def _unsqueeze(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Strided() as x, int(dim)]:
            return [x.unsqueeze(dim)]
        # Such as where a maximum was taken from, and the gradient of a convolution.
        case [Opaque() | Written() as kept, int()]:
            return [kept]
    return None


def _im2col(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Cut images [b, c, h, w] into patches [b, c * kh * kw, patches]: a view.

    Patches may overlap, but not reach beyond the image.
    """
    match arguments:
        case [Activation() as x, kernel, dilation, [0, 0], stride]:
            rows = x.unfold(2, kernel[0], stride[0], dilation[0])
            both = rows and rows.unfold(3, kernel[1], stride[1], dilation[1])
            if both is None:
                return None
            # [b, c, h', w', kh, kw] -> [b, c, kh, kw, h', w']
            return _view(lowering, node, [both.permute((0, 1, 4, 5, 2, 3))])
    return None


def _unfold(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Strided() as x, int(dim), int(size), int(step)]:
            return _one(x.unfold(dim, size, step))
    return None


def _stack(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [[Activation(), *_] as parts, *dims]:
            (dim,) = dims or (0,)
            dim %= len(node.outputs[0].shape)
            return _joined(lowering, [part.unsqueeze(dim) for part in parts], dim)
    return None


def _cat(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    values = zip(node.arguments[0], arguments[0], strict=True)
    arguments = [
        [part for value, part in values if value.shape != (0,)],
        *arguments[1:],
    ]
    match arguments:
        case [[Activation(), *_] as parts, *dims]:
            (dim,) = dims or (0,)
            return _joined(lowering, parts, dim % len(node.outputs[0].shape))
        case [[*parts]] | [[*parts], 0] if all(
            isinstance(part, WeightGradient | SampleSum) for part in parts
        ):
            return [JoinedGradients(tuple(parts))]
    return None


def _joined(lowering: Lowering, parts: list[Any], dim: int) -> Results:
    """Join activations along a dimension.

    Those of one buffer at equal distances are a view; others are copied.
    """
    if not all(isinstance(part, Activation) for part in parts):
        return None
    first = parts[0]
    if any(len(part.dims) != len(first.dims) for part in parts):
        return None
    distance = parts[1].offset - first.offset if len(parts) > 1 else 0
    if distance > 0 and all(
        part == replace(first, offset=first.offset + n * distance)
        for n, part in enumerate(parts)
    ):
        joined = (Axis(len(parts), distance), *first.dims[dim])
        return [
            replace(first, dims=(*first.dims[:dim], joined, *first.dims[dim + 1 :]))
        ]
    size = sum(part.shape[dim] for part in parts)
    if first.samples_dim == dim:
        return None
    y = lowering.like((*first.dims[:dim], (Axis(size, 1),), *first.dims[dim + 1 :]))
    start = 0
    for part in parts:
        end = start + part.shape[dim]
        place = y.slice(dim, start, end)
        if place is None or not lowering.copy(part, place):
            return None
        start = end
    return [y]


def _select_backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as dy, [*_], int(dim), int(index)]:
            dx = lowering.zeros(node.outputs[0].shape)
            return _put(lowering, dx, dx.select(dim, index % dx.shape[dim]), dy)
    return None


def _slice_backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as dy, [*_], int(dim), int(start), int(end), int(step)]:
            dx = lowering.zeros(node.outputs[0].shape)
            first, last, _ = slice(start, end).indices(dx.shape[dim])
            return _put(lowering, dx, dx.slice(dim, first, last, step), dy)
        case [SampleSum(rows) as whole, [*_], *_] if (
            rows.shape == node.outputs[0].shape
        ):
            return [whole]
    return None


def _put(
    lowering: Lowering, whole: Activation, part: Activation | None, x: Activation
) -> Results:
    return [whole] if part is not None and lowering.copy(x, part) else None


LOWERINGS: Lowerings = {
    "aten._to_copy.default": _to_float,
    "aten._unsafe_view.default": _view,
    "aten.alias.default": _same,
    "aten.cat.default": _cat,
    "aten.clone.default": _same,
    "aten.contiguous.default": _same,
    "aten.detach.default": _same,
    "aten.empty.memory_format": _opaque,
    "aten.expand.default": _expand,
    "aten.lift_fresh.default": _same,
    "aten.im2col.default": _im2col,
    "aten.permute.default": _permuted,
    "aten.select.int": _select,
    "aten.select_backward.default": _select_backward,
    "aten.slice.Tensor": _slice,
    "aten.slice_backward.default": _slice_backward,
    "aten.split.Tensor": _parts,
    "aten.split_with_sizes.default": _parts,
    "aten.squeeze.dim": _view,
    "aten.squeeze.dims": _view,
    "aten.squeeze.default": _view,
    "aten.stack.default": _stack,
    "aten.t.default": _transpose,
    "aten.transpose.int": _transpose,
    "aten.unbind.int": _unbind,
    "aten.unfold.default": _unfold,
    "aten.unsqueeze.default": _unsqueeze,
    "aten.view.default": _view,
    "aten.zeros.default": _zeros,
}
