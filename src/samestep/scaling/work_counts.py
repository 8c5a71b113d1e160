"""Counts of the work in one step: micro-batches, sums, partials."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samestep.core import tree
from samestep.core.ownership import shares


@dataclass(frozen=True)
class Work:
    """One step with even shares; a tuple has one entry for each rank of all nodes."""

    workers: int
    """Number on each node."""
    nodes: int
    micro_batches: tuple[int, ...]
    samples: tuple[float, ...]
    merges: tuple[int, ...]
    """Sums of two gradients inside the worker's own part of the tree."""
    partials: int
    """The most partial sums that the workers of one node contribute together."""
    rows: int
    """The most that one worker contributes."""
    node_rows: int
    """The most that one node contributes, having summed those of its workers."""

    @property
    def rounds(self) -> int:
        """The rounds of a barrier: ceil(log2 p)."""
        return (self.workers - 1).bit_length()


@lru_cache(maxsize=4096)
def work(workers: int, global_batch: int, micro_batches: int, nodes: int = 1) -> Work:
    """Count the work of one step with `workers` on each node."""
    owned = shares(micro_batches, nodes * workers)
    counts = [end - first for first, end in owned]
    contributed = [len(tree.subtrees(range_, micro_batches)) for range_ in owned]
    first_ranks = range(0, nodes * workers, workers)
    spans = [(owned[rank][0], owned[rank + workers - 1][1]) for rank in first_ranks]
    return Work(
        workers,
        nodes,
        tuple(counts),
        tuple(global_batch * count / micro_batches for count in counts),
        tuple(c - k for c, k in zip(counts, contributed, strict=True)),
        max(sum(contributed[rank : rank + workers]) for rank in first_ranks),
        max(contributed),
        max(len(tree.subtrees(span, micro_batches)) for span in spans),
    )


@lru_cache(maxsize=4096)
def expected_maximum(count: int) -> float:
    """Return E_p of p = `count` standard normal numbers: 0, 0.564, 0.846, 1.029 ..."""
    if count == 1:
        return 0.0
    x = np.linspace(-8, 8, 4001)
    cumulative = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(x * count * density * cumulative ** (count - 1), x))
