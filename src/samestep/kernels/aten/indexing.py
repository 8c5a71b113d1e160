"""Rows that are picked: of a table by tokens, of activations by constant indices."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NONE, Buffer, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Constant,
    Integers,
    Parameter,
    SampleSum,
    TableGradient,
    Zeros,
)


EXACT = 1 << 24
"""Integers below are floats, too; constants are kept as floats."""
MAX_RUNS = 64
"""Ranges of indices that follow each other; each is copied by one operation."""


def _index(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x, [*indices]] if picked := _picked(x, indices):
            dim, runs = picked
            if runs == [(0, x.shape[dim])]:
                return [x]
            y = lowering.activation(node.outputs[0].shape)
            return [y] if _copied(lowering, x, y, dim, runs) else None
    return None


def _index_select(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x, int(dim), Constant() as index]:
            indices = [*(None,) * (dim % len(x.dims)), index]
            return _index(lowering, node, [x, indices])
    return None


def _index_put(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Add a gradient to zeros at constant indices, each of which occurs once."""
    match arguments:
        case [Activation() as zeros, [*indices], Activation() as dy, True] if (
            picked := _picked(zeros, indices)
        ):
            dim, runs = picked
            taken = sorted(runs)
            if any(end > start for (_, end), (start, _) in pairwise(taken)):
                return None
            dx = lowering.zeros(node.outputs[0].shape)
            return [dx] if _copied(lowering, dx, dy, dim, runs, back=True) else None
    return None


def _copied(
    lowering: Lowering,
    whole: Activation,
    picked: Activation,
    dim: int,
    runs: list[tuple[int, int]],
    back: bool = False,
) -> bool:
    """Copy the runs of `whole` to `picked`, one after the other, or back."""
    first = 0
    for start, end in runs:
        last = first + end - start
        pair = whole.slice(dim, start, end), picked.slice(dim, first, last)
        if None in pair:
            return False
        source, target = reversed(pair) if back else pair
        assert isinstance(source, Activation)
        assert isinstance(target, Activation)
        if not lowering.copy(source, target):
            return False
        first = last
    return True


def _picked(
    x: Activation, indices: list[Any]
) -> tuple[int, list[tuple[int, int]]] | None:
    """Return the dimension that is indexed, and the runs of its indices."""
    given = [(dim, i) for dim, i in enumerate(indices) if i is not None]
    match given:
        case [(dim, Constant(data=data))] if data.dim() == 1 and x.samples_dim != dim:
            runs = list(_runs(data, x.shape[dim]))
            return (dim, runs) if len(runs) <= MAX_RUNS else None
    return None


def _runs(index: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Cut indices into ranges of increasing ones."""
    start = end = -1
    for number in (int(i) % size for i in index.tolist()):
        if number != end:
            if end >= 0:
                yield start, end
            start = number
        end = number + 1
    if end >= 0:
        yield start, end


def _positions(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Take rows of a table at constant indices: a view if they follow each other."""
    match arguments:
        case [Parameter() as table, Constant(), *_]:
            return _rows_at(lowering, node, table, node.arguments[1].data)
        case [Parameter() as table, [Constant()]]:
            return _rows_at(lowering, node, table, node.arguments[1][0].data)
    return None


def _rows_at(
    lowering: Lowering, node: Node, table: Parameter, index: Tensor
) -> Results:
    once = _indices(lowering, index)
    if once is None:
        return None
    runs = list(_runs(once.flatten(), table.shape[0]))
    if len(runs) > 1:
        return _embedding(lowering, node, [table, _constant_tokens(lowering, index)])
    taken = table.slice(0, *runs[0])
    viewed = taken and taken.view((*once.shape, *table.shape[1:]))
    spread = viewed and viewed.expand(node.outputs[0].shape)
    return [spread] if spread else None


def _indices(lowering: Lowering, index: Tensor) -> Tensor | None:
    """Return constant indices that a float can hold, once for all samples."""
    once = lowering.once(index) if index.dtype == torch.int64 else None
    is_small = once is not None and once.numel() and int(once.max()) < EXACT
    return once if is_small else None


def _constant_tokens(lowering: Lowering, index: Tensor) -> Integers:
    """Append constant indices, the same for each sample, as tokens."""
    once = _indices(lowering, index)
    assert once is not None
    positions, name = once.numel(), f"indices {len(lowering.constants)}"
    like = lowering.activation(index.shape)
    place = lowering.place(Constant(name, dims=(), data=once))
    lowering.ops.append(Op(OpKind.LOAD_TOKENS, [like.buffer, place, positions]))
    return Integers(like.buffer, positions, dims=like.dims)


def _positions_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [(SampleSum() | Activation()) as dy, Constant(), int(size), *rest]:
            index = node.arguments[1].data
            return _gradient_at(lowering, node, dy, index, [size, *rest])
        case [Zeros(), [Constant()], (SampleSum() | Activation()) as dy, True]:
            index, size = node.arguments[1][0].data, node.outputs[0].shape[0]
            return _gradient_at(lowering, node, dy, index, [size, NONE, False])
    return None


def _filled(value: float | None) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers an operation that fills a tensor, by default with a number."""

    def fill(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        number = arguments[-1] if value is None else value
        (value_of,) = node.outputs
        if not lowering.has_samples(value_of.shape):
            return [Zeros()] if value == 0 else None
        if not isinstance(number, int | float):
            return None
        y = lowering.activation(value_of.shape)
        lowering.fill(y, float(number))
        return [y]

    return fill


def _gradient_at(
    lowering: Lowering,
    node: Node,
    dy: SampleSum | Activation,
    index: Tensor,
    rest: list[Any],
) -> Results:
    """Return the gradient of a table; `rest` are its size and what has none."""
    once = _indices(lowering, index)
    if once is None:
        return None
    rows = dy.rows if isinstance(dy, SampleSum) else _without_samples(dy)
    if list(_runs(once.flatten(), rest[0])) == [(0, rest[0])] and rest[1] == NONE:
        viewed = rows.view(node.outputs[0].shape)
        return [SampleSum(viewed)] if viewed else None
    tokens = _constant_tokens(lowering, once)
    return _embedding_backward(lowering, node, [rows, tokens, *rest])


def _without_samples(x: Activation) -> Activation:
    """Return what is summed over samples."""
    dims = (tuple(axis for axis in dim if axis.stride is not None) for dim in x.dims)
    return replace(x, dims=tuple(dims))


def _embedding(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() as table, Integers() as tokens, *_]:
            places = _token_rows(tokens)
            is_plain = table.axes in ([], [Axis(table.size, 1)])
            if places is None or not is_plain or len(table.dims) != 2:
                return None
            vocabulary, width = table.shape
            y = lowering.like((*tokens.dims, (Axis(width, 1),) if width > 1 else ()))
            i = [tokens.buffer, y.buffer, width, lowering.place(table), *places]
            lowering.ops.append(Op(OpKind.EMBEDDING, [*i, vocabulary]))
            return [y]
    return None


def _embedding_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [
            Activation() as dy,
            Integers() as tokens,
            int(vocabulary),
            int(padding),
            False,
        ]:
            return [TableGradient(dy, tokens, vocabulary, padding)]
    return None


def _token_rows(tokens: Integers) -> list[int] | None:
    """Return rows, first row, step and positions, as operations take them."""
    axes = tokens.axes
    if len(axes) > 1:
        return None
    count, step = axes[0] if axes else (1, 0)
    return [tokens.rows, tokens.offset, step or 0, count]


def write_table_gradient(lowering: Lowering, place: int, result: TableGradient) -> None:
    """Append what writes the gradient of a table that lies at `place`."""
    tokens, vocabulary = result.tokens, result.vocabulary
    copy = lowering.transposed(lowering.tokens(lowering.whole(result.gradient)))
    places = _token_rows(tokens)
    assert places is not None  # the forward pass went through them
    lowering.buffers.append(Buffer(places[-1]))
    order, ends = len(lowering.buffers) - 1, lowering.room(vocabulary + 1)
    width = result.gradient.shape[-1]
    i = [copy, tokens.buffer, width, place, *places, vocabulary, ends, order]
    padding = result.padding if result.padding >= 0 else NONE
    lowering.ops.append(Op(OpKind.EMBEDDING_GRAD, [*i, padding]))


POSITIONS: Lowerings = {
    "aten.embedding.default": _positions,
    "aten.embedding_dense_backward.default": _positions_backward,
    "aten.index.Tensor": _positions,
    "aten.index_put.default": _positions_backward,
}
"""Tables at constant indices, where those of tokens or activations do not match."""
LOWERINGS: Lowerings = {
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.fill.Scalar": _filled(None),
    "aten.full_like.default": _filled(None),
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.index_select.default": _index_select,
    "aten.new_full.default": _filled(None),
    "aten.new_ones.default": _filled(1.0),
    "aten.new_zeros.default": _filled(0.0),
    "aten.zeros_like.default": _filled(0.0),
}
