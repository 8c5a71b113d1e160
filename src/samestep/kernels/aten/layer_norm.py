"""LayerNorm."""

from dataclasses import dataclass
from typing import Any

from samestep.kernels.interface import OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
    Tokens,
)
from samestep.kernels.program import NONE, Op
from samestep.kernels.tensors import Axis, row_major
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Parameter,
    SampleSum,
)


@dataclass(frozen=True)
class Normed:
    """What layer norm keeps for its backward pass."""

    inputs: Tokens
    means: int
    inverses: int


def _place(lowering: Lowering, vector: Parameter | None) -> int | None:
    """Return the offset of a weight or bias, NONE without, None if it is no vector."""
    if vector is None:
        return NONE
    is_vector = vector.axes in ([], [Axis(vector.size, 1)])
    return lowering.place(vector) if is_vector else None


def _tokens(lowering: Lowering, x: Activation, normed: list[int]) -> Tokens | None:
    """Return activations whose last dimensions are normed as one."""
    first = len(x.dims) - len(normed)
    size = 1
    for dim in normed:
        size *= dim
    viewed = x.view((*x.shape[:first], size))
    return None if viewed is None else lowering.tokens(viewed)


def _layer_norm(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [
            Activation() as x,
            [*normed],
            (Parameter() | None) as weight,
            (Parameter() | None) as bias,
            float(eps),
        ]:
            source = _tokens(lowering, x, normed)
            places = [_place(lowering, vector) for vector in (weight, bias)]
            known = [place for place in places if place is not None]
            if source is None or len(known) < 2 or (bias and not weight):
                return None
            y = lowering.like(x.dims)
            kept = [lowering.buffer(source.positions) for _ in range(2)]
            i = [source.buffer, y.buffer, *kept, source.features, *source.numbers]
            i += [y.rows, 0, source.features, *known]
            lowering.ops.append(Op(OpKind.LAYER_NORM, i, [eps]))
            saved = Normed(source, *kept)
            return [y, saved, saved]
    return None


def _layer_norm_backward(
    lowering: Lowering, node: Node, arguments: list[Any]
) -> Results:
    match arguments:
        case [
            Activation() as dy,
            _,
            [*normed],
            Normed() as saved,
            _,
            (Parameter() | None) as weight,
            _,
            [*needed],
        ]:
            source, place = _tokens(lowering, dy, normed), _place(lowering, weight)
            if source is None or place is None:
                return None
            dx, size = lowering.like(dy.dims), source.features
            sums = lowering.buffer(2 * size) if any(needed[1:]) else NONE
            i = [source.buffer, dx.buffer, saved.inputs.buffer, saved.means]
            i += [saved.inverses, sums, size, *source.numbers, dx.rows, 0, size]
            i += [*saved.inputs.place, place]
            lowering.ops.append(Op(OpKind.LAYER_NORM_GRAD, i))
            dims = row_major(tuple((Axis(n, 1),) * (n > 1) for n in normed))
            results = [dx] + [
                SampleSum(Activation(sums, 2 * size, dims=dims, offset=offset))
                for offset in (0, size)
            ]
            return [r for r, wanted in zip(results, needed, strict=True) if wanted]
    return None


LOWERINGS: Lowerings = {
    "aten.native_layer_norm.default": _layer_norm,
    "aten.native_layer_norm_backward.default": _layer_norm_backward,
}
