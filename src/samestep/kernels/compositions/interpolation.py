"""Linear interpolation between pixels, and means over windows."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from samestep.kernels.compositions.formula import Formula, Mismatch, activation, lowered
from samestep.kernels.compositions.moves import back, combine
from samestep.kernels.lowering import Lowerings
from samestep.kernels.values import Activation


KINDS = ("linear1d", "bilinear2d", "trilinear3d")


def _weights(size: int, out: int, is_aligned: bool, scale: float | None) -> Tensor:
    """Return what each of `out` pixels is of `size` others, float64 [out, size].

    `is_aligned` puts the first and last ones on each other, else the borders. `scale`
    is what the user has given instead of a size.
    """
    places = torch.arange(out, dtype=torch.float64)
    if is_aligned:
        places = places * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        step = 1 / scale if scale else size / out
        places = ((places + 0.5) * step - 0.5).clamp(min=0.0)
    first = places.floor().long().clamp(max=size - 1)
    second, share = (first + 1).clamp(max=size - 1), places - first
    table = torch.zeros(out, size, dtype=torch.float64)
    rows = torch.arange(out)
    table[rows, second] += share
    table[rows, first] += 1 - share
    return table


def _tables(
    shape: Sequence[int], out: Sequence[int], is_aligned: bool, scales: Sequence[Any]
) -> list[Tensor]:
    given = [*scales, *(None,) * len(out)]
    sizes = shape[len(shape) - len(out) :]
    return [
        _weights(size, new, is_aligned, scale)
        for size, new, scale in zip(sizes, out, given, strict=False)
    ]


def _mixed(
    formula: Formula, x: Activation, y: Activation, tables: Sequence[Tensor]
) -> Activation:
    """Append each pixel of y as a sum over those of x, [planes, pixels] of rows.

    The weight of two pixels is the product of those of each dimension.
    """
    table = torch.ones(1, 1, dtype=torch.float64)
    for part in tables:
        table = torch.kron(table, part)
    terms = int((table != 0).sum(1).max())
    order = torch.argsort((table == 0).byte(), dim=1, stable=True)[:, :terms]
    weights = table.gather(1, order)
    pixels = torch.where(weights != 0, order + 1, 0)
    planes = torch.arange(x.rows // table.shape[1])[:, None, None] * table.shape[1]
    rows = torch.where(pixels > 0, pixels + planes, 0).flatten(0, 1)
    each = weights.float().repeat(len(planes), 1)
    return combine(formula.lowering, x, y, rows, each)


def _plain(x: Any) -> Activation:
    """Return images whose first dimension has the samples. Raises Mismatch."""
    images = activation(x)
    if images.samples_dim is None or images.samples_dim > 1:
        raise Mismatch
    return images


def _linear(
    formula: Formula, x: Any, out: Any, is_aligned: bool, *scales: Any
) -> Activation:
    x = formula.lowering.whole(_plain(x))
    y = formula.lowering.activation(formula.node.outputs[0].shape)
    return _mixed(formula, x, y, _tables(x.shape, out, is_aligned, scales))


def _linear_backward(
    formula: Formula, dy: Any, out: Any, shape: Any, is_aligned: bool, *scales: Any
) -> Activation:
    dy = formula.lowering.whole(_plain(dy))
    dx = formula.lowering.activation(formula.node.outputs[0].shape)
    tables = _tables(shape, out, is_aligned, scales)
    return _mixed(formula, dy, dx, [table.T for table in tables])


def _mean_windows(
    formula: Formula, x: Any, kernel: Any, stride: Any, *padding: Any
) -> Activation:
    """Return means of windows of channels, as of LocalResponseNorm."""
    windows = _unfolded(activation(x), kernel, stride, padding)
    dims = tuple(range(len(windows.dims) - 3, len(windows.dims)))
    return formula.shaped(formula.sum(windows, dims, float(math.prod(kernel))))


def _mean_windows_backward(
    formula: Formula, dy: Any, x: Any, kernel: Any, stride: Any, *padding: Any
) -> Activation:
    dx = formula.lowering.activation(formula.node.outputs[0].shape)
    shares = formula.div(dy, float(math.prod(kernel)))

    def windows(at: Tensor) -> Tensor:
        for dim, (size, step) in enumerate(zip(kernel, stride, strict=True)):
            at = at.unfold(dim - 3, size, step).movedim(-1, 0)
        return at.flatten(0, 2).movedim(0, -1)

    _unfolded(dx, kernel, stride, padding)
    return back(formula.lowering, shares, dx, windows)


def _unfolded(x: Activation, kernel: Any, stride: Any, padding: Any) -> Activation:
    if padding and padding[0] != [0, 0, 0]:
        raise Mismatch
    first, view = len(x.dims) - 3, x
    for dim, (size, step) in enumerate(zip(kernel, stride, strict=True)):
        found = view.unfold(first + dim, size, step)
        if found is None:
            raise Mismatch
        view = found
    return view


LOWERINGS: Lowerings = {
    "aten.avg_pool3d.default": lowered(_mean_windows),
    "aten.avg_pool3d_backward.default": lowered(_mean_windows_backward),
    **{f"aten.upsample_{name}.default": lowered(_linear) for name in KINDS},
    **{
        f"aten.upsample_{name}_backward.default": lowered(_linear_backward)
        for name in KINDS
    },
}
