"""How much of each kind of work one step is: counted, not measured."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samestep import tree
from samestep.balance import shares


@dataclass(frozen=True)
class Work:
    """One step of `workers` workers with even shares; a tuple: one entry per rank."""

    workers: int
    micro_batches: tuple[int, ...]
    samples: tuple[float, ...]
    merges: tuple[int, ...]
    """Sums of two gradients on the way up the worker's own part of the tree."""
    partials: int
    """Partial sums that all workers contribute."""
    rows: int
    """The most that one worker contributes."""

    @property
    def rounds(self) -> int:
        """Of a barrier: ceil(log2 p)."""
        return (self.workers - 1).bit_length()


@lru_cache(maxsize=4096)
def work(workers: int, global_batch: int, micro_batches: int) -> Work:
    """Of one step with these."""
    owned = shares(micro_batches, workers)
    counts = [end - first for first, end in owned]
    contributed = [len(tree.subtrees(range_, micro_batches)) for range_ in owned]
    return Work(
        workers,
        tuple(counts),
        tuple(global_batch * count / micro_batches for count in counts),
        tuple(c - k for c, k in zip(counts, contributed, strict=True)),
        sum(contributed),
        max(contributed),
    )


@lru_cache(maxsize=4096)
def expected_maximum(count: int) -> float:
    """Of `count` independent standard normal numbers: 0, 0.564, 0.846, 1.029, ..."""
    if count == 1:
        return 0.0
    x = np.linspace(-8, 8, 4001)
    cumulative = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(x * count * density * cumulative ** (count - 1), x))
