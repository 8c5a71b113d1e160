"""Rows that are picked: of a table by tokens, of activations by constant indices."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

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
)


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
    """Take rows of a table at constant indices that follow each other."""
    match arguments:
        case [Parameter() as table, Constant(data=index), *_] if index.numel():
            runs = list(_runs(index.flatten(), table.shape[0]))
            taken = table.slice(0, *runs[0]) if len(runs) == 1 else None
            viewed = taken and taken.view(node.outputs[0].shape)
            return [viewed] if viewed else None
    return None


def _positions_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [SampleSum(rows), Constant(data=index), int(size), -1, False]:
            if list(_runs(index.flatten(), size)) != [(0, size)]:
                return None
            viewed = rows.view(node.outputs[0].shape)
            return [SampleSum(viewed)] if viewed else None
    return None


def _new_zeros(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    shape = node.outputs[0].shape
    has_samples = any(size and size % lowering.trace.samples == 0 for size in shape)
    return [lowering.zeros(shape)] if has_samples else None


def _embedding(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() as table, Integers() as tokens, *_]:
            places = _token_rows(tokens)
            if places is None or table.axes not in ([], [Axis(table.size, 1)]):
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
    if len(axes) > 1 or tokens.samples_dim is None:
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
}
"""Tables at constant indices, where those of tokens do not match."""
LOWERINGS: Lowerings = {
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.index.Tensor": _index,
    "aten.index_put.default": _index_put,
    "aten.index_select.default": _index_select,
    "aten.new_zeros.default": _new_zeros,
}
