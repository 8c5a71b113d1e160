"""Linear layers: products, and sums."""

from dataclasses import replace
from typing import Any

from samestep.kernels.interface import Binary, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Axis, Strided
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Parameter,
    SampleSum,
    WeightGradient,
)


def _addmm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Parameter() as bias, Activation() as x, Parameter() as weight]:
            if is_vector(bias) and _is_by_row(weight) and x.samples_dim == 0:
                return [linear(lowering, x, weight, lowering.place(bias))]
            product = _mm(lowering, node, [x, weight])
            if product:
                return [lowering.binary(Binary.ADD, product[0], bias)]
    return None


def _mm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation(samples_dim=0) as x, Parameter() as weight]:
            if _is_by_row(weight):
                return [linear(lowering, x, weight, NONE)]
            # The gradient of inputs, or a weight that is kept as [in, out].
            if _is_by_row(weight.transpose(0, 1)):
                return [linear_by_k(lowering, x, weight)]
        case [Activation(samples_dim=1) as x, Activation(samples_dim=0) as y]:
            return [WeightGradient(x.transpose(0, 1), y)]
    return None


def _bmm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    """Multiply matrices [1, m, k] and [1, k, n], as Einstein's notation does."""
    match arguments:
        case [Strided() as a, Strided() as b] if a.shape[0] == b.shape[0] == 1:
            a, b = (replace(part, dims=part.dims[1:]) for part in (a, b))
            for product in _mm(lowering, node, [a, b]) or ():
                is_gradient = isinstance(product, WeightGradient)
                return [product if is_gradient else product.unsqueeze(0)]
    return None


def is_vector(parameter: Parameter) -> bool:
    return parameter.axes in ([], [Axis(parameter.size, 1)])


def _is_by_row(weight: Parameter) -> bool:
    """Return whether [in, out] lies as [out, in], row after row."""
    return is_vector(weight.transpose(0, 1))


def linear(
    lowering: Lowering, x: Activation, weight: Parameter, bias: int
) -> Activation:
    tokens, features = lowering.tokens(x), weight.shape[1]
    y = lowering.like((*x.dims[:-1], (Axis(features, 1),)))
    i = [tokens.buffer, y.buffer, tokens.features, features]
    i += [lowering.place(weight), bias, 0, *tokens.numbers]
    lowering.ops.append(Op(OpKind.LINEAR, [*i, *lowering.tokens(y).place], [0.0]))
    return y


def linear_by_k(lowering: Lowering, x: Activation, weight: Parameter) -> Activation:
    tokens, features = lowering.tokens(x), weight.shape[1]
    y = lowering.like((*x.dims[:-1], (Axis(features, 1),)))
    i = [tokens.buffer, y.buffer, features, tokens.features]
    i += [lowering.place(weight), NONE, *tokens.numbers, *lowering.tokens(y).place]
    lowering.ops.append(Op(OpKind.LINEAR_GRAD_INPUT, i, [1.0]))
    return y


def _sum(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x, [*dims], *keep]:
            return [summed(lowering, x, dims, keep == [True])]
    return None


def _mean(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as x, [*dims], *keep]:
            dims = [dim % len(x.dims) for dim in dims]
            if x.samples_dim not in dims:
                return [summed(lowering, x, dims, keep == [True], mean=True)]
    return None


def summed(
    lowering: Lowering,
    x: Activation,
    dims: list[int],
    keep: bool = False,
    mean: bool = False,
) -> Activation | SampleSum:
    """Append the sum over dimensions, or the mean, and return it."""
    dims = [dim % len(x.dims) for dim in dims]
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    if any(axis.stride is not None for dim in dims for axis in x.dims[dim]):
        x = lowering.sum_rows(x, dims, float(count) if mean else 1.0)
    has_samples = x.samples_dim in dims
    kept = [
        () if n in dims else dim
        for n, dim in enumerate(x.dims)
        if keep or n not in dims
    ]
    result = replace(x, dims=tuple(kept))
    return SampleSum(result) if has_samples else result


LOWERINGS: Lowerings = {
    "aten.addmm.default": _addmm,
    "aten.bmm.default": _bmm,
    "aten.mean.dim": _mean,
    "aten.mm.default": _mm,
    "aten.sum.dim_IntList": _sum,
}
