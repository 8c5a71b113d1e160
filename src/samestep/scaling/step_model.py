"""The time of one step as a sum of terms, and the work that they are computed from.

All times in seconds, sizes in bytes. The formulas and their assumptions are in
docs/scaling.md. Sources: barriers by dissemination (Hensgen et al. 1988);
reduce-scatter and ring all-gather in the alpha-beta model (Thakur et al. 2005); overlap
of communication as a p-norm (Qiao et al. 2021, AdaptDL).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from samestep.core import tree
from samestep.core.ownership import shares


MEANING: dict[str, tuple[str, str]] = {
    "alpha": ("s", "fixed cost of a micro-batch"),
    "beta": ("s", "cost of a sample"),
    "kappa": ("1", "slow-down by each further worker that computes at the same time"),
    "nu": ("s^0.5", "straggling: standard deviation of a second of computing"),
    "e0": ("s", "exchange: fixed cost"),
    "lambda": ("s", "exchange: latency of a round"),
    "e1": ("s", "exchange: fixed cost of a second worker"),
    "tau": ("s/byte", "exchange: the processor's cost of a byte of messages"),
    "rho": ("s/byte", "adding one gradient to another (measured by itself)"),
    "q": ("1", "exchange: overlap with computing; 1: none"),
    "u0": ("s", "optimizer: the part that every worker repeats"),
    "u1": ("s", "optimizer: the part that is divided among the workers"),
    "o0": ("s", "other: fixed cost of a step"),
}
"""Unit and meaning of every parameter."""

FORMULA = (
    "T_step = compute + straggle + exchange + network + optimizer + other; "
    "compute = (1 + kappa (min(p, cores) - 1)) "
    "(alpha micro_batches + beta samples + rho bytes merges) of the slowest worker, "
    "straggle = nu E_p sqrt(compute), "
)
EXCHANGE = {
    "shared": "exchange = e0 + e1 + lambda ceil(log2 p) + rho bytes partials / p, "
    "optimizer = u0 + u1 / p, other = o0; between N nodes network = 2 latency + "
    "(k + 1) (N - 1) / N bytes (1 / bandwidth + tau) + rho bytes k",
    "gloo": "exchange = e0 + (B^q + N^q)^(1/q) - B + rho bytes partials, where B is "
    "the last backward pass and N = (p - 1) (lambda + tau bytes rows), "
    "optimizer = u0 + u1, other = o0; between N nodes network = "
    "(N p - 1) (latency + bytes rows / bandwidth)",
}


@dataclass(frozen=True)
class Network:
    """The network between nodes."""

    bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds."""


NO_NETWORK = Network(float("inf"), 0.0)
"""The network of a single node."""


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


@dataclass(frozen=True)
class Model:
    """The formulas with their parameters."""

    parameters: Mapping[str, float]
    exchange: str
    cores: int
    gradient_bytes: int
    backward: float = 0.5
    """Share of the compute time that is backward pass (gloo's overlap)."""

    def step(self, done: Work, network: Network = NO_NETWORK) -> float:
        """Return seconds of a step on machines like this one."""
        return sum(self.terms(done, network).values())

    def terms(self, done: Work, network: Network = NO_NETWORK) -> dict[str, float]:
        """Return seconds of a step by term."""
        workers, each = done.workers, self.compute(done, done.workers)
        by_node = [each[i : i + workers] for i in range(0, len(each), workers)]
        # The slowest worker; beyond the cores, workers take turns.
        compute = max(max(each), max(map(sum, by_node)) / self.cores)
        # Interruptions come at random, so the variance of a worker's time grows with
        # the time, and all wait for the unluckiest.
        unluckiest = expected_maximum(len(each)) * math.sqrt(compute)
        cost, shared = self.parameters, self.exchange == "shared"
        updating = cost["u0"] + (cost["u1"] / workers if shared else cost["u1"])
        return {
            "compute": compute,
            "straggle": cost["nu"] * unluckiest,
            "exchange": self.exchange_seconds(
                done, max(each) / max(done.micro_batches)
            ),
            "network": self.network_seconds(done, network),
            "optimizer": self.crowd(workers) * updating,
            "other": cost["o0"],
        }

    def crowd(self, workers: int) -> float:
        """Return workers per core, at least 1."""
        return max(1.0, workers / self.cores)

    def compute(self, done: Work, together: int) -> list[float]:
        """Return seconds of each rank, with `together` workers on its machine."""
        cost, n = self.parameters, self.gradient_bytes
        slow = 1 + cost["kappa"] * (min(together, self.cores) - 1)
        return [
            slow * (cost["alpha"] * m + cost["beta"] * s + cost["rho"] * n * a)
            for m, s, a in zip(
                done.micro_batches, done.samples, done.merges, strict=True
            )
        ]

    def exchange_seconds(self, done: Work, micro_batch: float) -> float:
        """Return seconds within one machine; `micro_batch`: compute seconds of one."""
        cost, shared = self.parameters, self.exchange == "shared"
        p = done.workers if shared else done.nodes * done.workers
        if p == 1:
            return cost["e0"]
        crowd, adding = self.crowd(done.workers), self.adding(done)
        if shared:
            barriers = cost["e1"] + cost["lambda"] * done.rounds
            return cost["e0"] + crowd * (barriers + adding)
        received = self.gradient_bytes * done.rows
        moved = crowd * (p - 1) * (cost["lambda"] + cost["tau"] * received)
        hidden = self.backward * micro_batch
        return cost["e0"] + overlapped(hidden, moved, cost["q"]) + crowd * adding

    def adding(self, done: Work) -> float:
        """Return seconds to add all partial sums: a slice of them, or all (gloo)."""
        shared = self.exchange == "shared"
        parts = done.partials * (1 / done.workers if shared else done.nodes)
        return self.parameters["rho"] * self.gradient_bytes * parts

    def network_seconds(self, done: Work, network: Network) -> float:
        """Return seconds between nodes."""
        n, nodes, k = self.gradient_bytes, done.nodes, done.node_rows
        if nodes == 1:
            return 0.0
        if self.exchange == "shared":
            sent = (k + 1) * (nodes - 1) / nodes * n
            byte = 1 / network.bandwidth + self.parameters["tau"]
            return 2 * network.latency + sent * byte + self.parameters["rho"] * n * k
        hops = nodes * done.workers - 1
        return hops * (network.latency + n * done.rows / network.bandwidth)


def overlapped(hidden: float, network: float, q: float) -> float:
    """Return the seconds by which `network` outlasts `hidden`, which it overlaps."""
    return float((hidden**q + network**q) ** (1 / q) - hidden)
