"""Products of matrices within each sample, and softmax: attention by hand."""

from typing import Any

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Lowerings,
)
from samestep.kernels.program import Op
from samestep.kernels.tensors import Axis, joined
from samestep.kernels.values import (
    Activation,
)


def _bmm(formula: Formula, a: Any, b: Any) -> Activation:
    """Multiply [groups, m, k] and [groups, k, n]; groups are samples and others."""
    a, b = _batched(formula, activation(a)), _batched(formula, activation(b))
    y = formula.lowering.activation(formula.node.outputs[0].shape)
    (groups, of_a), (also, of_b) = _group(a), _group(b)
    if groups != also:
        raise Mismatch
    (m, k), n = a.shape[1:], b.shape[2]
    strides = [_stride(a, 1), _stride(a, 2), of_b, _stride(b, 1), _stride(b, 2)]
    i = [a.buffer, y.buffer, b.buffer, a.rows, a.offset, b.rows, b.offset]
    i += [groups, m, n, k, of_a, *strides]
    formula.lowering.ops.append(Op(OpKind.MATMUL, i))
    return y


def _baddbmm(
    formula: Formula, x: Any, a: Any, b: Any, options: Any = None
) -> Activation:
    """Add a mask, or biases, to the products."""
    options = options or {}
    if options.get("beta", 1) != 1:
        raise Mismatch
    y = _bmm(formula, a, b)
    if options.get("alpha", 1) != 1:
        y = formula.mul(y, options["alpha"])
    return formula.add(y, x)


def _batched(formula: Formula, x: Activation) -> Activation:
    """Return a tensor whose samples are in the first dimension, or a copy of it."""
    if x.samples_dim != 0:
        raise Mismatch
    try:
        _group(x), _stride(x, 1), _stride(x, 2)
    except Mismatch:
        return formula.lowering.whole(x)
    return x


def _group(x: Activation) -> tuple[int, int]:
    """Return how many matrices a sample has, and how far apart they are."""
    samples, *others = x.dims[0]
    if samples.stride is not None:
        raise Mismatch
    return _single(joined(others))


def _stride(x: Activation, dim: int) -> int:
    return _single(joined(x.dims[dim]))[1]


def _single(axes: list[Axis]) -> tuple[int, int]:
    match axes:
        case []:
            return 1, 0
        case [Axis(size, int(stride))]:
            return size, stride
    raise Mismatch


def _softmax(formula: Formula, x: Any, dim: int, *rest: Any) -> Activation:
    return _softmax_of(formula, activation(x), dim, is_safe=False)


def _safe_softmax(formula: Formula, x: Any, dim: int, *rest: Any) -> Activation:
    return _softmax_of(formula, activation(x), dim, is_safe=True)


def _softmax_of(formula: Formula, x: Activation, dim: int, is_safe: bool) -> Activation:
    count, last = len(x.dims), dim % len(x.dims)
    if x.samples_dim == last:
        raise Mismatch
    order = [*(n for n in range(count) if n != last), last]
    x = formula.lowering.whole(x.permute(order))
    y = formula.lowering.like(x.dims)
    i = [x.buffer, y.buffer, x.rows, x.shape[-1], int(is_safe)]
    formula.lowering.ops.append(Op(OpKind.SOFTMAX, i))
    return y.permute([order.index(n) for n in range(count)])


def _softmax_backward(
    formula: Formula, dy: Any, y: Any, dim: int, *_: Any
) -> Activation:
    weighted = formula.sum(formula.mul(dy, y), (dim,))
    return formula.mul(formula.sub(dy, weighted), y)


LOWERINGS: Lowerings = {
    "aten._safe_softmax.default": lowered(_safe_softmax),
    "aten._softmax.default": lowered(_softmax),
    "aten._softmax_backward_data.default": lowered(_softmax_backward),
    "aten.baddbmm.default": lowered(_baddbmm),
    "aten.bmm.default": lowered(_bmm),
}
