"""Attention, as `scaled_dot_product_attention` computes it without dropout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import Op
from samestep.kernels.tensors import Axis, Strided, joined
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
    Parameter,
)


T = TypeVar("T", bound=Strided)
LANES = 16
"""Samples that a kernel computes at once, at most."""
TOGETHER = 16
"""Queries of which it has the scores in memory, at most."""


@dataclass(frozen=True)
class Attention:
    """What the forward pass of an attention keeps for its backward pass."""

    parts: tuple[Activation, ...]
    """Queries, keys and values [b, heads, positions, width], for the kernel."""
    op: Op
    key_heads: int
    """Heads of the keys and values, before they were repeated for those of queries."""


def _attention(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    *arguments, options = arguments if _has_options(arguments) else [*arguments, {}]
    match arguments:
        case [Activation() as q, Activation() as k, Activation() as v, *rest]:
            dropout, is_causal = [*rest, 0.0, False][:2] if len(rest) < 2 else rest
            scale = options.get("scale", 1 / math.sqrt(q.shape[-1]))
            spread = [_repeated(part, q.shape[1]) for part in (q, k, v)]
            parts = tuple(_plain(lowering, part) for part in spread if part)
            if dropout or not 0 < scale < math.inf or v.shape != k.shape:
                return None
            if len(parts) < 3 or not all(map(_is_of_samples, parts)):
                return None
            op, y = _operation(lowering, parts, scale)
            if is_causal:
                op.flags |= OpFlag.CAUSAL
            mask = options.get("attn_mask")
            if mask is not None and not _masked(lowering, op, mask, parts):
                return None
            lowering.ops.append(op)
            return [y, Attention(parts, op, k.shape[1])]
    return None


def _has_options(arguments: list[Any]) -> bool:
    return bool(arguments) and isinstance(arguments[-1], dict)


def _repeated(x: Activation, heads: int) -> Activation | None:
    """Return [b, heads, positions, width], each head of x for as many others."""
    if len(x.dims) != 4 or heads % x.shape[1]:
        return None
    samples, own, *rest = x.shape
    spread = x.unsqueeze(2).expand((samples, own, heads // own, *rest))
    return spread and spread.view((samples, heads, *rest))


def _operation(
    lowering: Lowering, parts: tuple[Activation, ...], scale: float
) -> tuple[Op, Activation]:
    """Return the operation and its outputs; parts are [b, heads, positions, width]."""
    samples, heads, positions, _ = parts[0].dims
    _, num_heads, queries, width = parts[0].shape
    keys = parts[1].shape[2]
    y = lowering.like((samples, positions, heads, _axis(width)))
    kept = lowering.like((samples, _axis(2 * num_heads * queries)))
    vectors = 6 * keys * width + TOGETHER * (4 * width + 3 + 2 * keys)
    sizes = [lowering.room(LANES * vectors), num_heads, queries, keys, width]
    views = [number for part in parts for number in _view(part)]
    i = [*views, y.buffer, kept.buffer, *[0] * 8, *sizes]
    return Op(OpKind.ATTENTION, i, [scale]), y.permute((0, 2, 1, 3))


def _masked(
    lowering: Lowering, op: Op, mask: Any, parts: tuple[Activation, ...]
) -> bool:
    """Add a mask to the operation; return whether there is a kernel for it."""
    if not isinstance(mask, Activation | Parameter):
        return False
    mask = _with_joined(mask)
    if isinstance(mask, Activation) and any(len(dim) > 1 for dim in mask.dims):
        mask = _with_joined(lowering.whole(mask))
    spread = mask.expand((*parts[0].shape[:3], parts[1].shape[2]))
    if spread is None or any(len(dim) > 1 for dim in spread.dims):
        return False
    strides = [dim[0].stride if dim else 0 for dim in spread.dims[1:]]
    if None in strides:
        return False
    place = [-1, 0, lowering.place(spread)] if isinstance(spread, Parameter) else None
    op.i += [*(place or [spread.buffer, spread.rows, spread.offset]), *strides]
    op.flags |= OpFlag.MASKED
    return True


def _axis(size: int) -> tuple[Axis, ...]:
    return (Axis(size, 1),) if size > 1 else ()


def _with_joined(x: T) -> T:
    """Return a view whose dimensions are one axis each, where one can be."""
    return replace(x, dims=tuple(tuple(joined(dim)) for dim in x.dims))


def _plain(lowering: Lowering, x: Activation) -> Activation:
    """Return activations whose dimensions are one axis each, features side by side."""
    x = _with_joined(x)
    dims = x.dims[1:]
    is_plain = all(len(dim) < 2 for dim in dims) and all(
        axis.stride != 0 for dim in dims for axis in dim
    )
    is_dense = not dims or dims[-1] in ((), _axis(x.shape[-1]))
    return x if is_plain and is_dense else _with_joined(lowering.whole(x))


def _is_of_samples(x: Activation) -> bool:
    """Return whether the first dimension are the samples, and nothing else."""
    return x.samples_dim == 0 and len(x.dims[0]) == 1


def _view(x: Activation) -> list[int]:
    """Return the five numbers of a view [b, heads, positions, width]."""
    strides = [dim[0].stride or 0 if dim else 0 for dim in x.dims[1:3]]
    return [x.buffer, x.rows, x.offset, *strides]


def _backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as dy, _, _, _, _, Attention() as kept, *_]:
            dy, forward = _plain(lowering, dy), kept.op
            if not _is_of_samples(dy):
                return None
            gradients = _gradients(lowering, kept.parts)
            i = [*forward.i[:17], *_view(dy), *(g.buffer for g in gradients)]
            i += forward.i[25:]
            lowering.ops.append(Op(OpKind.ATTENTION_GRAD, i, forward.f, forward.flags))
            to_queries, *others = gradients
            return [to_queries, *(_summed(lowering, g, kept.key_heads) for g in others)]
    return None


def _summed(lowering: Lowering, gradient: Activation, heads: int) -> Activation:
    """Return the gradient of keys or values whose heads were repeated."""
    samples, repeated, *rest = gradient.shape
    if repeated == heads:
        return gradient
    parts = gradient.view((samples, heads, repeated // heads, *rest))
    assert parts is not None
    total = lowering.sum_rows(parts, (2,))
    return replace(total, dims=(*total.dims[:2], *total.dims[3:]))


def _gradients(lowering: Lowering, parts: Sequence[Activation]) -> list[Activation]:
    """Return room for gradients: parts of one buffer have theirs in one, too.

    So what was cut from one tensor is joined again without a copy.
    """
    rows = [_rows_of(part) for part in parts]
    overlap = any(
        a.buffer == b.buffer and len(np.intersect1d(x, y))
        for (a, x), (b, y) in combinations(zip(parts, rows, strict=True), 2)
    )
    made: dict[int, int] = {}
    result = []
    for number, part in enumerate(parts):
        key = number if overlap else -1 - part.buffer
        if key not in made:
            made[key] = lowering.like((_axis(part.rows),)).buffer
        result.append(replace(part, buffer=made[key]))
    return result


def _rows_of(x: Activation) -> NDArray[np.int64]:
    """Return the numbers of a view's rows."""
    rows = np.array([x.offset])
    for size, stride in x.axes:
        rows = (rows[:, None] + np.arange(size) * (stride or 0)).ravel()
    return rows


LOWERINGS: Lowerings = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": _backward,
}
