"""Portable functions of float tensors: those of the kernels, and a few in numpy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.kernels.library import load_kernels


Doubles = NDArray[np.float64]

NAMES = ("exp", "log", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt")
"""Functions of the kernels, in the order of their numbers."""

CENTRAL = (
    *("0x1.805c5cfd0cbd9p+0", "0x1.f91e899589cd3p-3", "-0x1.11c3c4c2532b1p-8"),
    *("-0x1.4863d14ac6917p-10", "0x1.c9b4bef774388p-13", "-0x1.4f4455a1852c4p-18"),
    *("-0x1.cab129e9c6b38p-19", "0x1.00f7b4d3958c8p-21", "0x1.dabda37c2cd39p-27"),
    *("-0x1.74eccf59a18d4p-27", "0x1.c0009dcf76618p-31", "0x1.0e6f7cd270bfbp-33"),
    "-0x1.64596cd2bf6c4p-36",
)
TAIL = (
    *("0x1.6a9efbd5b5d5cp+1", "0x1.006dca6b9a9b4p+0", "0x1.35830e90deba3p-7"),
    *("-0x1.f4efd1f60c8bdp-8", "0x1.748c4a7fbe935p-8", "-0x1.d297719dd2f2bp-9"),
    *("0x1.85e62e95abd04p-10", "-0x1.3160def45671cp-13", "-0x1.34db1af61af8fp-12"),
    *("0x1.a81ae5d2ae46dp-13", "-0x1.dde3477c83fa4p-16", "-0x1.ac2bac2be75a6p-16"),
    "0x1.43395959498a6p-17",
)
"""Coefficients of the inverse error function: least squares in 1 / result, with a
relative error below 2^-32, in the manner of Giles (2012)."""
ROUND = 1.5 * 2.0**52
E = (
    *("0x1p0", "0x1.000000288b44fp-1", "0x1.555555675861fp-3", "0x1.5554acaf47b8cp-5"),
    *("0x1.1110c6242ab95p-7", "0x1.6d7565c858406p-10", "0x1.a15197f39bb88p-13"),
)
L = (
    *("0x1.5555554b9093fp-1", "0x1.9999ec3729b4fp-2"),
    *("0x1.245be339569aep-2", "0x1.dde346532ee16p-3"),
)


def compute(name: str, x: Tensor) -> Tensor:
    """Compute a function of `NAMES` of a float32 tensor on the CPU."""
    x = x.contiguous()
    y = torch.empty_like(x)
    number = NAMES.index(name)
    load_kernels().function(number, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def sqrt(x: Tensor) -> Tensor:
    """Compute square roots, rounded correctly, of floats or doubles on the CPU.

    torch gives them to MKL, which on processors of AMD is off by one bit for a third of
    all floats (torch 2.13).
    """
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.sqrt(x.detach().numpy()))


def expm1(x: Tensor) -> Tensor:
    """Compute e^x - 1 of a float32 tensor on the CPU."""
    values = x.detach().contiguous().numpy().astype(np.float64)
    rest, power = _exp_parts(np.clip(values, -110, 110))
    with np.errstate(over="ignore"):
        return torch.from_numpy((rest * power + (power - 1)).astype(np.float32))


def atanh(x: Tensor) -> Tensor:
    """Compute inverse hyperbolic tangents of a float32 tensor on the CPU."""
    values = x.detach().contiguous().numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        result = _log((1 + values) / (1 - values)) * 0.5
        result = np.where(np.abs(values) < 2.0**-13, values, result)
        result = np.where(np.abs(values) == 1, values * np.inf, result)
        return torch.from_numpy(result.astype(np.float32))


def erfinv(x: Tensor) -> Tensor:
    """Compute the inverse error function of a float32 tensor on the CPU."""
    values = x.detach().contiguous().numpy().astype(np.float64)
    with np.errstate(all="ignore"):
        w = -_log((1 - values) * (1 + values))
        central = _polynomial(w - 2.5, CENTRAL)
        tail = _polynomial(np.sqrt(w) - 3, TAIL)
        result = values * np.where(w < 5, central, tail)
        result = np.where(np.abs(values) == 1, values * np.inf, result)
        return torch.from_numpy(result.astype(np.float32))


def power(x: Tensor | float, exponent: Tensor | float) -> Tensor:
    """Compute powers; floats and float32 tensors on the CPU, one of them a tensor."""
    base, index = (
        part.detach().numpy().astype(np.float64)
        if isinstance(part, Tensor)
        else np.float64(part)
        for part in (x, exponent)
    )
    base, index = map(np.array, np.broadcast_arrays(base, index))
    with np.errstate(all="ignore"):
        result = _exp(index * _log(np.abs(base)))
        is_odd = np.abs(index) % 2 == 1
        result = np.where((base < 0) & is_odd, -result, result)
        result = np.where((base < 0) & (index != np.round(index)), np.nan, result)
        result = np.where((index == 0) | (base == 1), 1.0, result)
        return torch.from_numpy(result.astype(np.float32))


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    parts = (radius * compute(name, angle) for name in ("cos", "sin"))
    return torch.complex(*parts)


def _arange(result: Tensor, *ends: float) -> Tensor:
    start, step = (*ends, 1)[:3:2] if len(ends) > 1 else (0, 1)
    return torch.from_numpy(start + np.arange(len(result)) * float(step))


def _linspace(result: Tensor, start: float, end: float, *_: Any) -> Tensor:
    steps = len(result)
    values = start + np.arange(steps) * ((end - start) / max(1, steps - 1))
    values[1:][-1:] = end
    return torch.from_numpy(values)


def _qr(matrix: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor] | None:
    """Factor a tall matrix [m, n], by Gram and Schmidt, each column twice.

    Twice, since once loses orthogonality (Giraud and others 2005).
    """
    if matrix.dim() != 2 or matrix.shape[0] < matrix.shape[1] or mode != "reduced":
        return None
    columns = matrix.detach().t().numpy().astype(np.float64)
    upper = np.zeros((len(columns), len(columns)))
    for j, column in enumerate(columns):
        for _ in range(2):
            along = _halving_sum((columns[:j] * column).T)
            column -= _halving_sum(columns[:j] * along[:, None])
            upper[:j, j] += along
        upper[j, j] = np.sqrt(_halving_sum(column * column))
        column /= upper[j, j]
    q, r = (torch.from_numpy(part.astype(np.float32)) for part in (columns.T, upper))
    return q, r


def _halving_sum(terms: Doubles) -> Doubles:
    """Sum over the first axis: the second half is added to the first, again and again.

    The axis is filled with zeros up to a power of two. No terms give zeros.
    """
    size = 1 << max(0, len(terms) - 1).bit_length()
    total = np.zeros((size, *terms.shape[1:]))
    total[: len(terms)] = terms
    while len(total) > 1:
        size = len(total) // 2
        total = total[:size] + total[size:]
    result: Doubles = total[0]
    return result


OTHERS: Mapping[str, Callable[..., Any]] = {
    "atanh": atanh,
    "expm1": expm1,
    "erfinv": erfinv,
    "linalg_qr": _qr,
    "polar": _polar,
    "pow": power,
    "sqrt": sqrt,
}
"""Functions by the names of their ATen operations."""

DTYPES: Mapping[str, frozenset[torch.dtype]] = {
    "sqrt": frozenset({torch.float32, torch.float64})
}
"""The dtypes that a function takes, where it takes more than float32."""

RANGES: Mapping[str, Callable[..., Tensor]] = {
    "arange": _arange,
    "linspace": _linspace,
}
"""What computes equidistant numbers, float64 [n], for a result [n] of floats."""


def _exp(x: Doubles) -> Doubles:
    """Compute e^x; beyond the range of floats, anything beyond it."""
    rest, power = _exp_parts(np.where(x < -110, -110, np.where(x > 90, 90, x)))
    result: Doubles = (rest + 1) * power
    return result


def _exp_parts(x: Doubles) -> tuple[Doubles, Doubles]:
    """Return numbers with e^x = (rest + 1) * power."""
    n = x * float.fromhex("0x1.71547652b82fep+0") + ROUND - ROUND
    r = x - n * float.fromhex("0x1.62e42fefa39efp-1")
    return r * _polynomial(r, E), np.ldexp(1.0, np.nan_to_num(n).astype(int))


def _log(x: Doubles) -> Doubles:
    """Compute logarithms of normal doubles; NaN below 0."""
    bits = x.view(np.int64)
    k = (bits - 0x3FE6A09E667F3BCD + (1023 << 52) >> 52) - 1023
    m = (bits - (k << 52)).view(np.float64)
    s = (m - 1) / (m + 1)
    z = s * s
    y = k.astype(np.float64) * float.fromhex("0x1.62e42fefa39efp-1")
    y = y + s * (z * _polynomial(z, L) + 2)
    return np.where(x > 0, y, np.where(x == 0, -np.inf, np.nan))


def _polynomial(x: Doubles, coefficients: Sequence[str]) -> Doubles:
    *rest, last = (float.fromhex(c) for c in coefficients)
    total = np.full_like(x, last)
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total
