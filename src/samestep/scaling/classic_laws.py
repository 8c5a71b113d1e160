"""Two classical laws of scaling, for comparison with our own model.

Amdahl (1967): S(p) = 1 / (f + (1 - f) / p); f: share of the work that is serial.
Universal scalability law (Gunther 1993): X(p) = lambda p / (1 + sigma (p - 1) +
kappa p (p - 1)); lambda: samples per second of 1 worker, sigma: contention, kappa:
coherency; where kappa > 0, throughput peaks at p = sqrt((1 - sigma) / kappa).
"""

import math
from collections.abc import Sequence

import numpy as np


def amdahl_speedup(serial_fraction: float, workers: float) -> float:
    """S(p)."""
    return 1 / (serial_fraction + (1 - serial_fraction) / workers)


def fit_amdahl(workers: Sequence[int], speedups: Sequence[float]) -> float:
    """The serial fraction, 0 to 1: least squares in 1 / S, which is linear in it.

    1/S - 1/p = f (1 - 1/p). Raises ValueError without a point beyond 1 worker.
    """
    p, s = np.asarray(workers, float), np.asarray(speedups, float)
    x, y = 1 - 1 / p, 1 / s - 1 / p
    if not (x > 0).any():
        raise ValueError("no point with more than 1 worker")
    return float(np.clip((x * y).sum() / (x * x).sum(), 0, 1))


def usl_throughput(
    rate: float, sigma: float, kappa: float, workers: Sequence[float]
) -> list[float]:
    """X(p) in samples per second."""
    return [rate * p / (1 + sigma * (p - 1) + kappa * p * (p - 1)) for p in workers]


def fit_usl(
    workers: Sequence[int], rates: Sequence[float]
) -> tuple[float, float, float]:
    """(lambda, sigma, kappa), the last two not negative; needs 3 worker counts.

    p / X is linear in 1 / lambda, sigma / lambda and kappa / lambda. Residuals are
    relative. Raises ValueError.
    """
    from scipy.optimize import nnls

    p, x = np.asarray(workers, float), np.asarray(rates, float)
    if len(set(workers)) < 3:
        raise ValueError("fewer than 3 worker counts")
    terms = np.stack([np.ones_like(p), p - 1, p * (p - 1)], axis=1)
    weight = x / p
    solution, _ = nnls(terms * weight[:, None], np.ones_like(p))
    if solution[0] <= 0:
        raise ValueError("no positive throughput of 1 worker fits")
    return 1 / solution[0], solution[1] / solution[0], solution[2] / solution[0]


def usl_peak(sigma: float, kappa: float) -> float | None:
    """The number of workers with the highest throughput; None if it has no peak."""
    return math.sqrt(max(0.0, 1 - sigma) / kappa) if kappa > 1e-9 else None
