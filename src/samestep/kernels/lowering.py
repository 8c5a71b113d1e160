"""What lowers a recording to a program, one operation after another."""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from samestep.errors import NotPortable
from samestep.kernels.interface import Binary, OpKind, Unary
from samestep.kernels.program import CONSTANTS, Buffer, Op
from samestep.kernels.tensors import Axis, Dims, Strided, joined, paired, row_major
from samestep.kernels.trace import Node, Trace, Value
from samestep.kernels.values import (
    Activation,
    Constant,
    Ones,
    Opaque,
    Parameter,
    Places,
    Unknown,
    Zeros,
)


AXES = 6
"""Axes of rows that a pointwise operation goes through at most."""


@dataclass
class Lowering:
    """What has been lowered so far."""

    trace: Trace
    places: Places
    ops: list[Op] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    known: dict[Value, Any] = field(default_factory=dict)
    streams: int = 0
    mask_dims: list[int] = field(default_factory=list)
    """Which dimension of each dropout's mask the samples are."""
    gradient: Activation | Unknown | None = None
    """That of the outputs."""
    unknown: list[tuple[str, str]] = field(default_factory=list)
    """Operations without a kernel, and who called them."""
    by_sample: dict["Tokens", int] = field(default_factory=dict)
    """The transposed copies of activations."""
    constants: list[Tensor] = field(default_factory=list)
    """float32 [n] each, one after the other from CONSTANTS on."""
    constant_places: dict[str, int] = field(default_factory=dict)
    why_not: Callable[[Tensor], str | None] = lambda _: None
    """Tells what has computed a constant whose bits are not portable."""

    def activation(self, shape: Sequence[int]) -> Activation:
        """Return a new buffer for a tensor of this shape, samples included."""
        return self.like(self.dims_of(shape))

    def like(self, dims: Dims) -> Activation:
        """Return a new buffer for a tensor with these dimensions, in row-major order.

        Only the sizes of axes count, and where the samples are.
        """
        rows = rows_of(dims)
        return Activation(self.buffer(rows), rows, dims=row_major(dims))

    def buffer(self, rows: int) -> int:
        """Return the number of a new buffer by feature, with this number of rows."""
        self.buffers.append(Buffer(rows))
        return len(self.buffers) - 1

    def room(self, size: int) -> int:
        """Return a new buffer of `size` elements for any number of samples."""
        self.buffers.append(Buffer(size, is_room=True))
        return len(self.buffers) - 1

    def zeros(self, shape: Sequence[int]) -> Activation:
        """Append zeros of this shape, samples included, and return them."""
        y = self.activation(shape)
        self.fill(y, 0.0)
        return y

    def fill(self, y: Activation, value: float) -> None:
        """Append what sets all of y to a number."""
        self._append_unary(Unary.FILL, y, y, [value])

    def whole(self, x: Activation) -> Activation:
        """Return activations that have their buffer alone, rows in row-major order.

        That is `x` itself, or a copy.
        """
        return x if x.is_whole else self._unary(Unary.COPY, x, ())

    def flat(self, x: Activation) -> Activation:
        """Return activations whose rows follow each other, perhaps among others."""
        return x if x.axes in ([], [Axis(x.size, 1)]) else self.whole(x)

    def unary(
        self, function: Unary, x: Activation, numbers: Sequence[float] = ()
    ) -> Activation:
        """Append f(x), a function of `OP_UNARY`, and return it.

        Rows that are repeated are computed once, and repeated again.
        """
        once = [tuple(a for a in dim if a.stride != 0) for dim in x.dims]
        y = self._unary(function, replace(x, dims=tuple(once)), numbers)
        dims = []
        for dim, made in zip(x.dims, y.dims, strict=True):
            left = iter(made)
            dims.append(tuple(a if a.stride == 0 else next(left) for a in dim))
        return replace(y, dims=tuple(dims))

    def _unary(
        self, function: Unary, x: Activation, numbers: Sequence[float]
    ) -> Activation:
        y = self.like(x.dims)
        self._append_unary(function, x, y, numbers)
        return y

    def copy(self, x: Activation, y: Activation) -> bool:
        """Append a copy of x into y; False if samples would meet other indices."""
        return self._append_unary(Unary.COPY, x, y, ())

    def _append_unary(
        self, function: Unary, x: Activation, y: Activation, numbers: Sequence[float]
    ) -> bool:
        both = paired(x, y)
        if both is None:
            return False
        i = [x.buffer, y.buffer, function, x.rows, x.offset, y.rows, y.offset]
        i += axes_table(both[1])
        self.ops.append(Op(OpKind.UNARY, i, list(numbers)))
        return True

    def binary(
        self, function: Binary, a: Activation, b: Activation | Parameter | float
    ) -> Activation | None:
        """Append f(a, b), a function of `OP_BINARY`, and return it.

        Dimensions of size 1 are repeated. None if samples would meet other indices.
        """
        number, rows, first = -2, 0, 0
        if isinstance(b, Activation):
            number, rows, first = b.buffer, b.rows, b.offset
        elif isinstance(b, Parameter):
            number, first = -1, self.place(b)
        both = paired(a, b if isinstance(b, Strided) else Activation(0, 0, dims=()))
        if both is None:
            return None
        dims, pairs = both
        y = self.like(dims)
        i = [a.buffer, y.buffer, number, function, a.rows, a.offset, rows, first]
        i += axes_table(pairs)
        self.ops.append(
            Op(OpKind.BINARY, i, [] if isinstance(b, Strided) else [float(b)])
        )
        return y

    def place(self, parameter: Parameter) -> int:
        """Return where the first element of a parameter's view lies."""
        if isinstance(parameter, Constant):
            return self._constant_place(parameter) + parameter.offset
        if parameter.name not in self.places.parameters:
            raise NotPortable(
                "With portable arithmetic a forward pass reads parameters and buffers "
                f"that stay, and `{parameter.name}` is a buffer that changes: make it "
                'a parameter without gradient, or set `arithmetic = "torch"`.'
            )
        return self.places.parameters[parameter.name] + parameter.offset

    def _constant_place(self, constant: Constant) -> int:
        name = constant.name
        if name not in self.constant_places:
            if reason := self.why_not(constant.data):
                self.unknown.append(("constants", f"the model, by {reason}"))
            self._keep(name, constant.data.detach().float().flatten())
        return self.constant_places[name]

    def numbers(self, numbers: Tensor) -> int:
        """Return where constant float32 or int32 [n] lie; equal ones are kept once."""
        name = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
        if name not in self.constant_places:
            self._keep(name, numbers.view(torch.float32))
        return self.constant_places[name]

    def _keep(self, name: str, constant: Tensor) -> None:
        self.constant_places[name] = CONSTANTS + sum(map(len, self.constants))
        self.constants.append(constant)

    def sum_rows(
        self, x: Activation, dims: Collection[int], divisor: float = 1.0
    ) -> Activation:
        """Append the sum over dimensions, apart from samples, and return it.

        Summed dimensions stay, with size 1 (or the samples). Terms are ordered as in
        the tensor.
        """
        kept = [dim for n, dim in enumerate(x.dims) if n not in dims]
        summed = [dim for n, dim in enumerate(x.dims) if n in dims]
        axes = [_without_samples(part) for part in (kept, summed)]
        if max(map(len, axes)) > 2:
            order = sorted(range(len(x.dims)), key=lambda n: (n in dims, n))
            moved = self.whole(x.permute(order))
            back = [order.index(n) for n in range(len(order))]
            return self.sum_rows(moved.permute(back), dims, divisor)
        shape = tuple(
            tuple(a for a in dim if a.stride is None or n not in dims)
            for n, dim in enumerate(x.dims)
        )
        y = self.like(shape)
        padded = [[*(Axis(1, 0) for _ in range(2 - len(part))), *part] for part in axes]
        four = [axis for part in padded for axis in part]
        i = [x.buffer, y.buffer, x.rows, x.offset]
        i += [*(axis.size for axis in four), *(axis.stride or 0 for axis in four)]
        self.ops.append(Op(OpKind.SUM_ROWS, i, [divisor]))
        return y

    def tokens(self, x: Activation) -> "Tokens":
        """Return activations [..., features] as positions; copied if they must be."""
        *outer, inner = x.dims
        if any(axis.stride is None for axis in inner):
            raise NotPortable(
                "Portable arithmetic takes the features of a layer from the last "
                "dimension, which must not have the samples."
            )
        positions, features = _without_samples(outer), joined(inner)
        is_plain = len(positions) < 2 and features in ([], [Axis(x.shape[-1], 1)])
        if not is_plain:
            return self.tokens(self.whole(x))
        count, step = positions[0] if positions else (1, 0)
        return Tokens(x.buffer, x.rows, x.offset, count, step or 0, x.shape[-1])

    def result_of(self, value: Any) -> Any:
        """Return what an argument became; numbers are themselves."""
        if isinstance(value, list):
            return [self.result_of(part) for part in value]
        if isinstance(value, dict):
            return {name: self.result_of(part) for name, part in value.items()}
        if not isinstance(value, Value):
            return value
        if value.name == "gradient":
            return self.gradient
        if value not in self.known:
            self.known[value] = self.given(value)
        return self.known[value]

    def _with_samples(self, data: Tensor) -> Activation | Constant | Opaque:
        """Return a constant with a dimension of samples: the same for all of them."""
        if data.is_floating_point() and not bool((data != data.flatten()[0]).any()):
            y = self.activation(data.shape)
            self._append_unary(Unary.FILL, y, y, [float(data.flatten()[0])])
            return y
        samples, sizes = self.trace.samples, enumerate(data.shape)
        dim, *others = (dim for dim, size in sizes if size and size % samples == 0)
        inner = (data.shape[dim] // samples, *data.shape[dim + 1 :])
        apart = data.reshape(*data.shape[:dim], samples, *inner)
        first = apart.narrow(dim, 0, 1)
        if others or bool((apart != first).any()):
            return Opaque()
        dims = list(_plain(first.shape))
        dims[dim : dim + 2] = [(Axis(samples, 0), *dims[dim + 1])]
        return Constant(f"constant {len(self.known)}", dims=tuple(dims), data=first)

    def has_samples(self, shape: Sequence[int]) -> bool:
        """Return whether a dimension of this shape has the samples."""
        return any(size and size % self.trace.samples == 0 for size in shape)

    def once(self, data: Tensor) -> Tensor | None:
        """Return a constant with size 1 for the samples; None if they differ."""
        once = data
        for dim, size in enumerate(data.shape):
            once = once.narrow(dim, 0, 1) if size == self.trace.samples else once
        is_same = not self.has_samples(once.shape) and bool((data == once).all())
        return once if is_same else None

    def given(self, value: Value) -> Any:
        """Return what a tensor that no kernel has made becomes."""
        if value.name and value.data is None:
            return Parameter(value.name, dims=_plain(value.shape))
        if value.data is None or not value.data.numel():
            return Opaque()
        name = value.name or f"constant {len(self.known)}"
        if self.has_samples(value.shape):
            return self._with_samples(value.data)
        return Constant(name, dims=_plain(value.shape), data=value.data)

    def given_for_ones(self, value: Any, result: Any) -> Any:
        """Return the tensor itself for one that might have become a mask or a state."""
        if isinstance(value, list):
            return list(map(self.given_for_ones, value, result))
        if isinstance(value, dict):
            return {
                k: self.given_for_ones(part, result[k]) for k, part in value.items()
            }
        if not isinstance(result, Ones | Zeros):
            return result
        if value.data is None and self.has_samples(value.shape):
            y = self.activation(value.shape)
            self.fill(y, float(isinstance(result, Ones)))
            return y
        return self.given(value)

    def transposed(self, source: "Tokens") -> int:
        """Return a copy of activations by sample; made once."""
        if source not in self.by_sample:
            buffer = Buffer(source.features, True, positions=source.positions)
            self.buffers.append(buffer)
            copy = self.by_sample[source] = len(self.buffers) - 1
            if source != inputs(source.features):  # inputs are loaded both ways
                i = [source.buffer, copy, source.features, *source.numbers]
                self.ops.append(Op(OpKind.TRANSPOSE, i))
        return self.by_sample[source]

    def dims_of(self, shape: Sequence[int]) -> Dims:
        """Return dimensions of this shape; samples come before what they merge with."""
        samples = self.trace.samples
        dims = []
        for size in shape:
            axes = [Axis(size, 1)]
            if size % samples == 0:
                axes = [Axis(samples, None), Axis(size // samples, 1)]
            dims.append(tuple(axis for axis in axes if axis.size > 1))
        return tuple(dims)


@dataclass(frozen=True)
class Tokens:
    """Activations at several positions, each of `features` rows that follow each other.

    Position p has the rows from `first + p * step` on.
    """

    buffer: int
    rows: int
    """All rows of the buffer."""
    first: int
    positions: int
    step: int
    features: int

    @property
    def numbers(self) -> list[int]:
        """Positions, rows, first and step, as operations take them."""
        return [self.positions, *self.place]

    @property
    def place(self) -> list[int]:
        """Rows, first and step."""
        return [self.rows, self.first, self.step]


def _plain(shape: Sequence[int]) -> Dims:
    """Return the dimensions of a tensor that lies in row-major order."""
    return row_major(tuple(map(_axis, shape)))


def inputs(features: int) -> Tokens:
    """Return the inputs of the program, as one position."""
    return Tokens(0, features, 0, 1, 0, features)


def rows_of(dims: Dims) -> int:
    """Return the number of rows of a tensor with these dimensions."""
    axes = (axis for dim in dims for axis in dim)
    return math.prod(axis.size for axis in axes if axis.stride is not None)


def _axis(size: int) -> tuple[Axis, ...]:
    return (Axis(size, 1),) if size > 1 else ()


def _without_samples(dims: Iterable[Sequence[Axis]]) -> list[Axis]:
    axes = (axis for dim in dims for axis in dim)
    return joined(axis for axis in axes if axis.stride is not None)


def axes_table(axes: Sequence[Sequence[int]]) -> list[int]:
    """Return the sizes of `AXES` axes, then each operand's strides.

    Each axis is (size, stride, ...). Raises NotPortable if there are more.
    """
    if len(axes) > AXES:
        raise NotPortable(
            f"Portable arithmetic goes through at most {AXES} axes of one operation, "
            f"not {len(axes)}: make the tensor contiguous before, in two steps."
        )
    operands = len(axes[0]) if axes else 3
    unit = (1, *(0,) * (operands - 1))
    rows = [*(unit for _ in range(AXES - len(axes))), *axes]
    return [row[column] for column in range(operands) for row in rows]


Results = list[Any] | None
"""What the outputs of an operation became; None: there is no kernel."""

Lowerings = Mapping[str, Callable[[Lowering, Node, list[Any]], Results]]
"""The functions that lower ATen operations, by their names."""
