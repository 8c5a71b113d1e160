"""What labels and other indices pick."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from samestep.kernels.aten import indexing
from samestep.kernels.compositions import materialise
from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import Lowering, Lowerings, Results
from samestep.kernels.program import Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node, Value
from samestep.kernels.values import Activation, Constant, Integers


def pick(formula: Formula, x: Any, labels: Any) -> Activation:
    """Return x[..., label] of x [..., classes] and labels [...]."""
    lowering = formula.lowering
    x, labels = lowering.whole(activation(x)), materialise.integers(lowering, labels)
    classes = x.shape[-1]
    positions = x.size // classes
    if labels.size != positions:
        raise Mismatch
    y = lowering.like(x.dims[:-1])
    i = [x.buffer, y.buffer, labels.buffer, positions, classes]
    lowering.ops.append(Op(OpKind.PICK, i))
    return y


def spread(formula: Formula, dy: Any, labels: Any, classes: int) -> Activation:
    """Return [..., classes]: dy [...] at the labels [...], else 0."""
    lowering = formula.lowering
    dy, labels = lowering.whole(activation(dy)), materialise.integers(lowering, labels)
    dims = (*dy.dims, (Axis(classes, 1),) if classes > 1 else ())
    if labels.size != dy.size:
        raise Mismatch
    dx = lowering.like(dims)
    i = [dy.buffer, dx.buffer, labels.buffer, dy.size, classes]
    lowering.ops.append(Op(OpKind.PICK_GRAD, i))
    return dx


def _gather(formula: Formula, x: Any, dim: int, index: Any, *_: Any) -> Activation:
    x = activation(x)
    x, index, order = _last(x, dim), _last(_strided(index), dim), _order(x, dim)
    taken, classes = index.shape[-1], x.shape[-1]
    if index.shape[:-1] != x.shape[:-1]:
        raise Mismatch
    repeated = x.unsqueeze(-2).expand((*x.shape[:-1], taken, classes))
    if repeated is None:
        raise Mismatch
    y = pick(formula, repeated, index)
    return y.permute([order.index(n) for n in range(len(order))])


def _scatter_add(
    formula: Formula, base: Any, dim: int, index: Any, dy: Any
) -> Activation:
    """Add dy to zeros, or to other numbers."""
    return formula.add(base, _scattered(formula, base, dim, index, dy))


def _scatter(formula: Formula, base: Any, dim: int, index: Any, dy: Any) -> Activation:
    """Put dy, or one number, in the place of others."""
    if activation(base).shape[dim] and _strided(index).shape[dim] != 1:
        raise Mismatch
    ones = formula.filled(activation(numbers(formula, index)), 1.0)
    mask = _scattered(formula, base, dim, index, ones)
    if isinstance(dy, int | float):
        put = formula.mul(mask, float(dy))
    else:
        put = _scattered(formula, base, dim, index, dy)
    return formula.choose(mask, put, base)


def numbers(formula: Formula, index: Any) -> Any:
    """Return integers as floats."""
    return materialise.numbers(formula.lowering, index)


def _scattered(
    formula: Formula, base: Any, dim: int, index: Any, dy: Any
) -> Activation:
    base = activation(base)
    order = _order(base, dim)
    dy, index = _last(activation(dy), dim), _last(_strided(index), dim)
    if index.shape[:-1] != _last(base, dim).shape[:-1] or dy.shape != index.shape:
        raise Mismatch
    dx = formula.sum(spread(formula, dy, index, base.shape[dim]), (-2,))
    dx = replace(dx, dims=(*dx.dims[:-2], dx.dims[-1]))
    return dx.permute([order.index(n) for n in range(len(order))])


def _order(x: Any, dim: int) -> list[int]:
    """Return the order of dimensions in which `dim` is the last."""
    count = len(x.dims)
    return [*(n for n in range(count) if n != dim % count), dim % count]


def _last(x: Any, dim: int) -> Any:
    return x.permute(_order(x, dim))


def _strided(index: Any) -> Any:
    if not isinstance(index, Integers | Activation):
        raise Mismatch
    return index


def _by_label(formula: Formula, x: Any, indices: Any) -> Activation:
    """Return x[torch.arange(samples), labels], or the rows of a table at labels."""
    match indices:
        case [_, (Integers() | Activation()) as labels] if _counts_samples(formula):
            return pick(formula, x, labels)
        case [(Integers() | Activation()) as labels] if isinstance(x, Constant):
            return rows(formula, x, labels)
    raise Mismatch


def _put_by_label(
    formula: Formula, base: Any, indices: Any, dy: Any, adds: bool = False
) -> Activation:
    match indices:
        case [_, (Integers() | Activation()) as labels] if adds and _counts_samples(
            formula
        ):
            dx = spread(formula, dy, labels, activation(base).shape[-1])
            return formula.add(base, dx)
    raise Mismatch


def _counts_samples(formula: Formula) -> bool:
    """Return whether the first index of an operation is 0, 1, 2, ... of the samples."""
    first = formula.node.arguments[1][0]
    if not isinstance(first, Value) or first.data is None:
        return False
    samples = formula.lowering.trace.samples
    return first.data.shape == (samples,) and first.data.tolist() == [*range(samples)]


def rows(formula: Formula, table: Constant, labels: Any) -> Activation:
    """Return rows of a constant table [n, ...]; what has none gives NaN."""
    lowering = formula.lowering
    labels = materialise.integers(lowering, labels)
    count, *inner = table.shape
    if table.axes not in ([], [Axis(table.size, 1)]):
        raise Mismatch
    width = table.size // count
    y = lowering.like((*labels.dims, *((Axis(n, 1),) * (n > 1) for n in inner)))
    places = [labels.rows, 0, 1, labels.size, count]
    i = [labels.buffer, y.buffer, width, lowering.place(table), *places]
    lowering.ops.append(Op(OpKind.EMBEDDING, i))
    return y


def _of_computed(
    name: str, place: int
) -> Callable[[Lowering, Node, list[Any]], Results]:
    """Return what lowers an operation of tokens that are computed."""

    def lower(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
        if len(arguments) <= place or not isinstance(arguments[place], Activation):
            return None
        given = list(arguments)
        given[place] = materialise.integers(lowering, given[place])
        return indexing.LOWERINGS[name](lowering, node, given)

    return lower


TOKENS = {"aten.embedding.default": 1, "aten.embedding_dense_backward.default": 1}
LOWERINGS: Lowerings = {
    **{name: _of_computed(name, place) for name, place in TOKENS.items()},
    "aten.gather.default": lowered(_gather),
    "aten.index.Tensor": lowered(_by_label),
    "aten.index_put.default": lowered(_put_by_label),
    "aten.scatter.src": lowered(_scatter),
    "aten.scatter.value": lowered(_scatter),
    "aten.scatter_add.default": lowered(_scatter_add),
}
