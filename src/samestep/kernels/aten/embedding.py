"""Tables whose rows stand for tokens."""

from typing import Any

from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Activation,
    Integers,
    Lowering,
    Lowerings,
    Parameter,
    Results,
    TableGradient,
)
from samestep.kernels.program import NONE, Buffer, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node


def _embedding(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() as table, Integers() as tokens, *_]:
            places = _places(tokens)
            if places is None or table.axes not in ([], [Axis(table.size, 1)]):
                return None
            vocabulary, width = table.shape
            y = lowering.like((*tokens.dims, (Axis(width, 1),) if width > 1 else ()))
            i = [tokens.buffer, y.buffer, width, lowering.place(table), *places]
            lowering.ops.append(Op(OpKind.EMBEDDING, [*i, vocabulary]))
            return [y]
    return None


def _backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
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


def _places(tokens: Integers) -> list[int] | None:
    """Return rows, first row, step and positions, as operations take them."""
    axes = tokens.axes
    if len(axes) > 1 or tokens.samples_dim is None:
        return None
    count, step = axes[0] if axes else (1, 0)
    return [tokens.rows, tokens.offset, step or 0, count]


def write_gradient(lowering: Lowering, place: int, result: TableGradient) -> None:
    """Append what writes the gradient of a table that lies at `place`."""
    tokens, vocabulary = result.tokens, result.vocabulary
    copy = lowering.transposed(lowering.tokens(lowering.whole(result.gradient)))
    places = _places(tokens)
    assert places is not None  # the forward pass went through them
    lowering.buffers.append(Buffer(places[-1]))
    order, ends = len(lowering.buffers) - 1, lowering.room(vocabulary + 1)
    width = result.gradient.shape[-1]
    i = [copy, tokens.buffer, width, place, *places, vocabulary, ends, order]
    padding = result.padding if result.padding >= 0 else NONE
    lowering.ops.append(Op(OpKind.EMBEDDING_GRAD, [*i, padding]))


LOWERINGS: Lowerings = {
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _backward,
}
