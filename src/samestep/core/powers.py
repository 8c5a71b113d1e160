"""Powers of arrays that are the same on every machine: they only add and multiply.

`**` belongs to the C library, whose last bit may differ from machine to machine, and
where it is vectorized with the place in the vector.
"""

import math

import numpy as np
from numpy.typing import NDArray


Doubles = NDArray[np.float64]

LOGARITHM = [2 / (2 * k + 1) for k in range(12)]
"""Coefficients of log(m) / s in powers of s^2, with s = (m - 1) / (m + 1)."""
LOG_2 = float.fromhex("0x1.62e42fefa39efp-1")
EXPONENTIAL = [1 / math.factorial(k) for k in range(14)]
"""Taylor coefficients of exp(x)."""


def powers(base: Doubles, exponent: float) -> Doubles:
    """Return `base` [n], at least 0, to a positive power, within 1e-12 of it.

    What is below 1e-304 is 0.
    """
    mantissa, binary = np.frexp(base)
    is_small = mantissa < 0.7071
    mantissa = np.where(is_small, 2 * mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    logarithm = (binary - is_small) * LOG_2 + s * _horner(LOGARITHM, s * s)
    x = exponent * logarithm
    is_zero = (base == 0) | (x < -700)  # below, results would be subnormal
    x = np.where(is_zero, 0.0, x)
    whole = np.round(x / LOG_2)
    result = np.ldexp(_horner(EXPONENTIAL, x - whole * LOG_2), whole.astype(np.int64))
    return np.where(is_zero, 0.0, result)


def _horner(coefficients: list[float], x: Doubles) -> Doubles:
    result = np.zeros_like(x)
    for coefficient in reversed(coefficients):
        result = result * x + coefficient
    return result
