"""Operations that only move, repeat or add up elements: lists of rows for each row.

Where an element comes from is found by executing the operation once, on numbers that
say where they are. So every such operation needs one line here, and no kernel. The
gradient of one is the sum, for each element, over the places that it has gone to.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import OpKind, Unary
from samestep.kernels.lowering import Lowering, Lowerings, Results
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Axis, Dims, row_major
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import Activation, Parameter


Operation = Callable[..., Any]
"""An operation of torch, on tensors and numbers."""
MOST_TERMS = 1 << 24
"""Terms of one operation's lists."""


def combine(
    lowering: Lowering,
    x: Activation,
    y: Activation,
    rows: Tensor,
    weights: Tensor | None = None,
) -> Activation:
    """Append the sums of rows of `x` into `y`, and return it.

    `rows` int64 [rows of y, terms] are numbers of rows of `x`, each plus one; zeros are
    left out. `weights` float32 [rows of y, terms] are their factors.
    """
    x = lowering.whole(x)
    kept = rows > 0
    ends = torch.zeros(len(rows) + 1, dtype=torch.int32)
    ends[1:] = kept.sum(1).cumsum(0)
    lists = [ends, (rows[kept] - 1).int()]
    places = [lowering.numbers(part.view(torch.float32)) for part in lists]
    places.append(NONE if weights is None else lowering.numbers(weights[kept]))
    lowering.ops.append(
        Op(OpKind.COMBINE, [x.buffer, y.buffer, x.rows, y.rows, *places])
    )
    return y


def numbered(dims: Dims, rows: int) -> Tensor:
    """Return for each element of a tensor sample * rows + row, plus one; float64.

    `rows` are all that a sample has, in row-major order; 0 gives the row plus one.
    """
    total = torch.ones((), dtype=torch.float64)
    for dim in row_major(dims):
        index = torch.zeros(1, dtype=torch.float64)
        for size, stride in dim:
            step = rows if stride is None else stride
            index = (index[:, None] + torch.arange(size) * step).flatten()
        total = total[..., None] + index
    return total


def _sources(x: Activation, y: Activation, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the row of `x` plus one that each row of `y` is from; 0: from none.

    `move` gives numbers [shape of y, terms]; the result is int64 [rows of y, terms].
    Raises Mismatch if samples are mixed.
    """
    size = max(1, x.size)
    moved = move(numbered(x.dims, size)).flatten(0, len(y.dims) - 1)
    if moved.numel() > MOST_TERMS * 64:
        raise Mismatch
    target = numbered(y.dims, y.rows).flatten().long() - 1
    sample, row = target // y.rows, target % y.rows
    own = torch.where(moved > 0, moved - sample[:, None] * size, 0.0)
    rows = torch.zeros(y.rows, moved.shape[1], dtype=torch.int64)
    rows[row] = own.long()  # those of one sample, whichever is last
    if bool((rows[row] != own).any()) or bool(((rows < 0) | (rows > size)).any()):
        raise Mismatch
    return rows


def back(
    lowering: Lowering, dy: Activation, dx: Activation, move: Callable[[Tensor], Tensor]
) -> Activation:
    """Append the sums of where each element of `dx` has gone, and return it.

    `move` gives numbers [shape of dy, terms] from those of `dx`.
    """
    y = lowering.like(dy.dims)
    rows = _sources(dx, y, move)
    return combine(lowering, dy, dx, _transposed(rows, dx.rows))


def _transposed(rows: Tensor, count: int) -> Tensor:
    """Return for each of `count` rows those it has gone to plus one, in their order."""
    terms = rows.shape[1]
    source = rows.flatten().numpy()
    order = np.argsort(source, kind="stable")
    order = order[source[order] > 0]
    sizes = np.bincount(source[order] - 1, minlength=count)
    table = np.zeros((count, max(1, int(sizes.max(initial=0)))), np.int64)
    column = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table[source[order] - 1, column] = order // terms + 1
    return torch.from_numpy(table)


def moved(operation: Operation) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers an operation whose first argument is moved."""

    def move(formula: Formula, x: Any, *rest: Any) -> Activation:
        x, arguments = activation(x), _constants(formula.node.arguments[1:])
        y = formula.lowering.activation(formula.node.outputs[0].shape)
        rows = _sources(x, y, lambda at: operation(at, *arguments)[..., None])
        return combine(formula.lowering, x, y, rows)

    return lowered(move)


def moved_back(
    operation: Operation, gradient: int = 0, skipped: Iterable[int] = ()
) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers the gradient of an operation, or its accumulation in zeros.

    `gradient` is the argument that is moved back; those `skipped` are no arguments of
    the operation, which takes a tensor of the result's shape first.
    """
    left_out = {gradient, *skipped}

    def move(formula: Formula, *arguments: Any) -> Activation:
        dy = activation(arguments[gradient])
        rest = [a for n, a in enumerate(formula.node.arguments) if n not in left_out]
        others = _constants(rest)
        dx = formula.lowering.activation(formula.node.outputs[0].shape)
        move = lambda at: operation(at, *others)[..., None]  # noqa: E731
        return back(formula.lowering, dy, dx, move)

    return lowered(move)


def _constants(arguments: Any) -> list[Any]:
    """Return arguments with constants as tensors. Raises Mismatch for other tensors."""
    result: list[Any] = []
    for argument in arguments:
        if isinstance(argument, list):
            result.append(_constants(argument))
        elif not isinstance(argument, Value):
            result.append(argument)
        elif argument.data is None:
            raise Mismatch
        else:
            result.append(argument.data)
    return result


def _padded(formula: Formula, x: Any, pad: Any, value: float = 0) -> Activation:
    y = _pad(formula, activation(x), pad)
    if not value:
        return y
    inside = _pad(formula, formula.unary(Unary.FILL, x, [1.0]), pad)
    return formula.choose(inside, y, formula.filled(y, value))


def _pad(formula: Formula, x: Activation, pad: Any) -> Activation:
    y = formula.lowering.activation(formula.node.outputs[0].shape)
    rows = _sources(x, y, lambda at: torch.constant_pad_nd(at, pad)[..., None])
    return combine(formula.lowering, x, y, rows)


def _cumulative(formula: Formula, x: Any, dim: int) -> Activation:
    """Add up what comes before, and the element itself."""
    x = activation(x)

    def before(at: Tensor) -> Tensor:
        terms = at.movedim(dim, -1)
        square = terms[..., None, :].expand(*terms.shape, terms.shape[-1])
        return square.tril().movedim(-2, dim)

    y = formula.lowering.like(x.dims)
    return combine(formula.lowering, x, y, _sources(x, y, before))


def _repeated(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Repeat a parameter [n] for every sample, [samples * n]: a view."""
    match arguments:
        case [Parameter() as parameter, [samples]] if (
            samples == lowering.trace.samples and len(parameter.dims) == 1
        ):
            dims = ((Axis(samples, 0), *parameter.dims[0]),)
            return [replace(parameter, dims=dims)]
    return moved(ATEN.repeat.default)(lowering, node, arguments)


ATEN = torch.ops.aten
PADS = [
    f"{name}{n}d" for name in ("reflection_pad", "replication_pad") for n in (1, 2, 3)
]
NEAREST = [
    f"{name}{n}d"
    for name in ("upsample_nearest", "_upsample_nearest_exact")
    for n in (1, 2, 3)
]
MOVES = (
    *("channel_shuffle", "diagonal", "flip", "gather", "im2col", "index_select"),
    *("pixel_shuffle", "pixel_unshuffle", "roll", "tril", "triu"),
)
LOWERINGS: Lowerings = {
    **{
        f"aten.{name}.default": moved(getattr(ATEN, name).default)
        for name in (*MOVES, *PADS, *NEAREST)
    },
    **{
        f"aten.{name}_backward.default": moved_back(
            getattr(ATEN, name).default, skipped=(1,)
        )
        for name in PADS
    },
    **{
        f"aten.{name}_backward.default": moved_back(
            getattr(ATEN, name).default, skipped=(2,)
        )
        for name in NEAREST
    },
    "aten.col2im.default": moved_back(ATEN.im2col.default, skipped=(1,)),
    "aten.constant_pad_nd.default": lowered(_padded),
    "aten.cumsum.default": lowered(_cumulative),
    "aten.diagonal_backward.default": moved_back(ATEN.diagonal.default, skipped=(1,)),
    "aten.index.Tensor": moved(ATEN.index.Tensor),
    "aten.index_add.default": moved_back(ATEN.index_select.default, 3, (0,)),
    "aten.index_put.default": moved_back(ATEN.index.Tensor, 2, (0, 3)),
    "aten.repeat.default": _repeated,
    "aten.scatter_add.default": moved_back(ATEN.gather.default, 3, (0,)),
    "aten.slice.Tensor": moved(ATEN.slice.Tensor),
}
