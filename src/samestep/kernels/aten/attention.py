"""Attention, as `scaled_dot_product_attention` computes it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.lowering import (
    Lowering,
    Lowerings,
    Results,
)
from samestep.kernels.program import NO_FLAGS, Op
from samestep.kernels.tensors import Axis
from samestep.kernels.trace import Node
from samestep.kernels.values import (
    Activation,
)


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


def _attention(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    *arguments, options = arguments if _has_options(arguments) else [*arguments, {}]
    match arguments:
        case [Activation() as q, Activation() as k, Activation() as v, *rest]:
            dropout, is_causal = [*rest, 0.0, False][:2] if len(rest) < 2 else rest
            width = q.shape[-1]
            scale = options.pop("scale", 1 / math.sqrt(width))
            if options or dropout or not 0 < scale < math.inf:
                return None
            parts = tuple(_plain(lowering, part) for part in (q, k, v))
            if len(q.dims) != 4 or not all(map(_is_of_samples, parts)):
                return None
            if k.shape[:2] != q.shape[:2] or v.shape != k.shape:
                return None
            return _appended(lowering, parts, scale, bool(is_causal))
    return None


def _has_options(arguments: list[Any]) -> bool:
    return bool(arguments) and isinstance(arguments[-1], dict)


def _appended(
    lowering: Lowering, parts: tuple[Activation, ...], scale: float, is_causal: bool
) -> Results:
    """Append the operation; parts are [b, heads, positions, width]."""
    samples, heads, positions, _ = parts[0].dims
    _, num_heads, queries, width = parts[0].shape
    keys = parts[1].shape[2]
    y = lowering.like((samples, positions, heads, _axis(width)))
    kept = lowering.like((samples, _axis(2 * num_heads * queries)))
    vectors = 6 * keys * width + TOGETHER * (4 * width + 3 + 2 * keys)
    sizes = [lowering.room(LANES * vectors), num_heads, queries, keys, width]
    views = [number for part in parts for number in _view(part)]
    op = Op(OpKind.ATTENTION, [*views, y.buffer, kept.buffer, *[0] * 8, *sizes])
    op.f, op.flags = [scale], OpFlag.CAUSAL if is_causal else NO_FLAGS
    lowering.ops.append(op)
    return [y.permute((0, 2, 1, 3)), Attention(parts, op)]


def _axis(size: int) -> tuple[Axis, ...]:
    return (Axis(size, 1),) if size > 1 else ()


def _plain(lowering: Lowering, x: Activation) -> Activation:
    """Return activations whose dimensions are one axis each, features side by side."""
    dims = x.dims[1:]
    is_plain = all(len(dim) < 2 for dim in dims) and all(
        axis.stride != 0 for dim in dims for axis in dim
    )
    is_dense = not dims or dims[-1] in ((), _axis(x.shape[-1]))
    return x if is_plain and is_dense else lowering.whole(x)


def _is_of_samples(x: Activation) -> bool:
    """Return whether the first dimension are the samples, and nothing else."""
    return x.samples_dim == 0 and len(x.dims[0]) == 1


def _view(x: Activation) -> list[int]:
    """Return the five numbers of a view [b, heads, positions, width]."""
    strides = [dim[0].stride or 0 if dim else 0 for dim in x.dims[1:3]]
    return [x.buffer, x.rows, x.offset, *strides]


def _backward(lowering: Lowering, node: Node, arguments: list[Any]) -> Results:
    match arguments:
        case [Activation() as dy, _, _, _, _, Attention(parts, forward), *_]:
            dy = _plain(lowering, dy)
            if not _is_of_samples(dy):
                return None
            gradients = _gradients(lowering, parts)
            i = [*forward.i[:17], *_view(dy), *(g.buffer for g in gradients)]
            lowering.ops.append(
                Op(
                    OpKind.ATTENTION_GRAD,
                    [*i, *forward.i[25:]],
                    forward.f,
                    forward.flags,
                )
            )
            return list(gradients)
    return None


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
