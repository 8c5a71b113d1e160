"""Tensors of a recording as views of rows, so that views need no operation.

A buffer of activations has rows of samples; a tensor [b, c, h, w] has c * h * w of them
in row-major order. A view says for each dimension which rows it goes through. A
dimension is a product of axes: merging [b, t] to [b * t] keeps both, with any
strides, and the samples may stand anywhere.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self


class Axis(NamedTuple):
    """Steps of equal length through the rows."""

    size: int
    stride: int | None
    """Rows from one index to the next; 0 repeats; None are the samples."""


Dims = tuple[tuple[Axis, ...], ...]
"""The axes of each dimension, the outer ones first; none of size 1."""


@dataclass(frozen=True, kw_only=True)
class Strided:
    """A tensor whose elements lie at `offset` plus a multiple of each axis' stride.

    Methods are those of `Tensor`, with dimensions counted from the first or last; None
    stands for what is no view.
    """

    dims: Dims
    offset: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions, samples included."""
        return tuple(math.prod(axis.size for axis in dim) for dim in self.dims)

    @property
    def axes(self) -> list[Axis]:
        """All axes but the samples, neighbours joined where they are one."""
        every = (axis for dim in self.dims for axis in dim)
        return joined(axis for axis in every if axis.stride is not None)

    @property
    def size(self) -> int:
        """The number of rows, repeated ones included."""
        return math.prod(axis.size for axis in self.axes)

    @property
    def samples_dim(self) -> int | None:
        """The dimension of the samples, perhaps with others; None without samples."""
        for number, dim in enumerate(self.dims):
            if any(axis.stride is None for axis in dim):
                return number
        return None

    def view(self, shape: Sequence[int]) -> Self | None:
        """Return the same elements in order, with another shape."""
        axes = joined(axis for dim in self.dims for axis in dim)
        dims = []
        for size in shape:
            dim = _take(axes, size)
            if dim is None:
                return None
            dims.append(dim)
        return None if axes else replace(self, dims=tuple(dims))

    def permute(self, order: Sequence[int]) -> Self:
        """Return the view with its dimensions in another order."""
        return replace(self, dims=tuple(self.dims[dim] for dim in order))

    def transpose(self, first: int, second: int) -> Self:
        """Exchange two dimensions."""
        order = list(range(len(self.dims)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    def select(self, dim: int, index: int) -> Self | None:
        """Return one index of a dimension, without that dimension."""
        part = self.slice(dim, index, index + 1)
        if part is None:
            return None
        dim %= len(self.dims)
        return replace(part, dims=part.dims[:dim] + part.dims[dim + 1 :])

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> Self | None:
        """Return the indices `range(start, end, step)` of a dimension, 0 <= start."""
        dim %= len(self.dims)
        size = self.shape[dim]
        chosen = range(start, min(end, size), step)
        if len(chosen) == size:
            return self
        axes = joined(self.dims[dim])
        if not chosen or len(axes) != 1 or axes[0].stride is None:
            return None
        stride = axes[0].stride
        new = _axis(len(chosen), stride * step)
        dims = (*self.dims[:dim], new, *self.dims[dim + 1 :])
        return replace(self, dims=dims, offset=self.offset + chosen[0] * stride)

    def unfold(self, dim: int, size: int, step: int, dilation: int = 1) -> Self | None:
        """Return windows along a dimension, their indices as a new last dimension."""
        dim %= len(self.dims)
        whole, axes = self.shape[dim], joined(self.dims[dim])
        count = (whole - (size - 1) * dilation - 1) // step + 1
        if count < 1 or len(axes) > 1 or (axes and axes[0].stride is None):
            return None
        stride = (axes[0].stride or 0) if axes else 0
        dims = list(self.dims)
        dims[dim] = _axis(count, stride * step)
        return replace(self, dims=(*dims, _axis(size, stride * dilation)))

    def expand(self, shape: Sequence[int]) -> Self | None:
        """Repeat dimensions of size 1; new ones come first."""
        new = len(shape) - len(self.dims)
        dims = []
        for size, dim, old in zip(
            shape, ((),) * new + self.dims, (1,) * new + self.shape, strict=True
        ):
            if old not in (1, size):
                return None
            dims.append(dim if old == size else _axis(size, 0))
        return replace(self, dims=tuple(dims))

    def unsqueeze(self, dim: int) -> Self:
        """Add a dimension of size 1 before `dim`."""
        dim %= len(self.dims) + 1
        return replace(self, dims=(*self.dims[:dim], (), *self.dims[dim:]))


def joined(axes: Iterable[Axis]) -> list[Axis]:
    """Return the axes with neighbours joined where one continues the other."""
    result: list[Axis] = []
    for axis in axes:
        last = result[-1] if result else None
        if (
            last is not None
            and last.stride is not None
            and axis.stride is not None
            and last.stride == axis.size * axis.stride
        ):
            result[-1] = Axis(last.size * axis.size, axis.stride)
        else:
            result.append(axis)
    return result


def row_major(dims: Dims) -> Dims:
    """Return the same dimensions over rows of their own, in row-major order."""
    stride, result = 1, []
    for dim in reversed(dims):
        axes = []
        for axis in reversed(dim):
            axes.append(axis if axis.stride is None else Axis(axis.size, stride))
            stride *= 1 if axis.stride is None else axis.size
        result.append(tuple(reversed(axes)))
    return tuple(reversed(result))


class Pair(NamedTuple):
    """An axis that two tensors go through together."""

    size: int
    first: int
    second: int


def paired(a: Strided, b: Strided) -> tuple[Dims, list[Pair]] | None:
    """Return the dimensions of `a + b`, and the common axes of both without samples.

    The strides of the dimensions are those of `a`. None if samples meet others.
    """
    count = max(len(a.dims), len(b.dims))
    dims, pairs = [], list[Pair]()
    for x, y in zip(
        ((),) * (count - len(a.dims)) + a.dims,
        ((),) * (count - len(b.dims)) + b.dims,
        strict=True,
    ):
        both = _refined(x, y)
        if both is None:
            return None
        dims.append(tuple(axis for axis, _ in both))
        pairs += [
            Pair(axis.size, axis.stride, other.stride)
            for axis, other in both
            if axis.stride is not None and other.stride is not None
        ]
    samples = [axis for dim in dims for axis in dim if axis.stride is None]
    return (tuple(dims), _joined_pairs(pairs)) if len(samples) < 2 else None


def _refined(x: Sequence[Axis], y: Sequence[Axis]) -> list[tuple[Axis, Axis]] | None:
    """Return the axes of one dimension of both, cut to the same sizes."""
    first, second = list(x), list(y)
    if not first or not second:  # one is repeated
        return [
            (a if first else _repeated(a), a if second else _repeated(a))
            for a in first or second
        ]
    result: list[tuple[Axis, Axis]] = []
    while first and second:
        a, b = first.pop(), second.pop()
        size = min(a.size, b.size)
        if (a.stride is None) != (b.stride is None) or a.size % size or b.size % size:
            return None
        for axis, left in ((a, first), (b, second)):
            if axis.size > size:
                if axis.stride is None:
                    return None
                left.append(Axis(axis.size // size, axis.stride * size))
        result.insert(0, (Axis(size, a.stride), Axis(size, b.stride)))
    return None if first or second else result


def _repeated(axis: Axis) -> Axis:
    return axis if axis.stride is None else Axis(axis.size, 0)


def _joined_pairs(pairs: Iterable[Pair]) -> list[Pair]:
    result: list[Pair] = []
    for pair in pairs:
        size, first, second = pair
        if result and result[-1][1:] == (size * first, size * second):
            result[-1] = Pair(result[-1].size * size, first, second)
        else:
            result.append(pair)
    return result


def _axis(size: int, stride: int) -> tuple[Axis, ...]:
    return (Axis(size, stride),) if size > 1 else ()


def _take(axes: list[Axis], size: int) -> tuple[Axis, ...] | None:
    """Remove a dimension of this size from the front; None if axes cannot be cut so."""
    dim = []
    while size > 1:
        if not axes:
            return None
        axis = axes.pop(0)
        if size % axis.size:
            if axis.size % size or axis.stride is None:
                return None
            rest = axis.size // size
            axes.insert(0, Axis(rest, axis.stride))
            axis = Axis(size, axis.stride * rest)
        dim.append(axis)
        size //= axis.size
    return tuple(dim)
