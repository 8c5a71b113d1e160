"""Largest and smallest elements along dimensions, and what is computed from them."""

from dataclasses import dataclass
from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import Binary, OpKind, Unary
from samestep.kernels.lowering import Lowerings, rows_of
from samestep.kernels.program import Op
from samestep.kernels.tensors import Dims
from samestep.kernels.values import Activation, Integers, Opaque


@dataclass(frozen=True)
class Taken(Opaque):
    """Where the largest elements along a dimension are, for their gradient."""

    buffer: int
    dims: Dims
    """The dimensions of what they were taken from."""
    windows: list[int]
    """As `OP_MAX_POOL` has them: planes and both axes."""


def _extreme(formula: Formula, x: Any, dim: int, sign: int) -> tuple[Activation, Taken]:
    """Return the largest or smallest along a dimension, which stays with size 1."""
    lowering, x = formula.lowering, activation(x)
    dim %= max(1, len(x.dims))
    if x.samples_dim == dim or not x.dims:
        raise Mismatch
    if sign < 0:
        x = formula.unary(Unary.NEG, x)
    x = lowering.whole(x)
    y = lowering.like((*x.dims[:dim], (), *x.dims[dim + 1 :]))
    inner, size = rows_of(x.dims[dim + 1 :]), x.shape[dim]
    windows = [y.rows // inner, size, 1, size, size, 0, 1, inner, inner, 1, 1, 0, 1]
    taken = Taken(lowering.buffer(y.rows), x.dims, windows)
    i = [x.buffer, y.buffer, taken.buffer, *windows]
    lowering.ops.append(Op(OpKind.MAX_POOL, i))
    return (y if sign > 0 else formula.unary(Unary.NEG, y)), taken


def _along(sign: int) -> Any:
    def extreme(formula: Formula, x: Any, dim: int, keep: bool = False) -> list[Any]:
        y, taken = _extreme(formula, x, dim, sign)
        return [formula.shaped(y), taken]

    return lowered(extreme)


def _given_back(formula: Formula, _: Any, dim: int, taken: Any, dy: Any) -> Activation:
    """Put a gradient where the elements were taken from; zeros elsewhere."""
    if not isinstance(taken, Taken):
        raise Mismatch
    lowering, dy = formula.lowering, formula.lowering.whole(activation(dy))
    dx = lowering.like(taken.dims)
    i = [dy.buffer, dx.buffer, taken.buffer, *taken.windows]
    lowering.ops.append(Op(OpKind.MAX_POOL_GRAD, i))
    return dx


def _over(sign: int) -> Any:
    def extremes(
        formula: Formula, x: Any, dims: Any = (), keep: bool = False
    ) -> Activation:
        return formula.shaped(largest(formula, x, dims, sign))

    return lowered(extremes)


def largest(formula: Formula, x: Any, dims: Any, sign: int = 1) -> Activation:
    """Return the largest over dimensions, which stay with size 1."""
    if not dims:
        raise Mismatch
    for dim in dims:
        x, _ = _extreme(formula, x, dim, sign)
    return activation(x)


def _index(sign: int) -> Any:
    def index(
        formula: Formula, x: Any, dim: int | None = None, keep: bool = False
    ) -> Integers:
        x = activation(x)
        if dim is None:
            raise Mismatch
        dim %= len(x.dims)
        order = [*(n for n in range(len(x.dims)) if n != dim), dim]
        y, taken = _extreme(formula, x.permute(order), -1, sign)
        dims = [*y.dims[:-1]]
        if keep:
            dims.insert(dim, ())
        return Integers(taken.buffer, y.rows, dims=tuple(dims))

    return lowered(index)


def _log_sum_exp(formula: Formula, x: Any, dims: Any, keep: bool = False) -> Activation:
    """Return log(sum(exp(x - top))) + top; an infinite top counts as zero."""
    top = largest(formula, x, dims)
    is_finite = formula.binary(Binary.LESS, formula.unary(Unary.ABS, top), float("inf"))
    top = formula.binary(Binary.WHERE, top, is_finite)
    powers = formula.unary(Unary.EXP, formula.sub(x, top))
    logarithm = formula.unary(Unary.LOG, formula.sum(powers, dims))
    return formula.shaped(formula.add(logarithm, top))


LOWERINGS: Lowerings = {
    "aten.amax.default": _over(1),
    "aten.amin.default": _over(-1),
    "aten.argmax.default": _index(1),
    "aten.argmin.default": _index(-1),
    "aten.logsumexp.default": lowered(_log_sum_exp),
    "aten.max.dim": _along(1),
    "aten.min.dim": _along(-1),
    "aten.scatter.src": lowered(_given_back),
}
