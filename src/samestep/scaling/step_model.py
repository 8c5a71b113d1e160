"""The formulas for the time of one step.

All times in seconds, sizes in bytes. With p workers on c cores, worker r owning m_r
micro-batches with s_r samples, and a gradient of n bytes:

    compute_r = slow(p) (alpha m_r + beta s_r + rho n merges_r)
        A fixed cost per micro-batch, one per sample, and one per byte of the worker's
        own sums of gradients (`samestep.core.tree`). rho is measured by itself.
    slow(p)   = 1 + kappa (min(p, c) - 1)
        How independent workers slow each other down through memory and clock rate; it
        is measured with such workers.
    compute   = max(max_r compute_r, sum_r compute_r / c)
        The slowest worker; beyond the cores, they take turns.
    straggle  = nu E_p sqrt(compute)
        Interruptions come at random, so the variance of a worker's time grows with the
        time, and all wait for the unluckiest: E_p is the expected maximum of p standard
        normal numbers.
    exchange  = e0 + [p > 1] e1 + lambda ceil(log2 p) + rho n partials / p    (shared)
        Barriers by dissemination (Hensgen et al. 1988), and a fixed cost of having any
        other worker; every worker adds its slice of all partial sums.
    exchange  = e0 + overlap(B, (p - 1) (lambda + tau n rows)) + rho n partials (gloo)
        A ring all-gather (alpha-beta model, Thakur et al. 2005), which begins inside
        the last backward pass, B seconds long: overlap(B, N) = (B^q + N^q)^(1/q) - B
        (p-norm of Qiao et al. 2021, AdaptDL; q = 1: no overlap).
    optimizer = u0 + u1 / p                     (gloo: u0 + u1, each worker updates all)
    other     = o0
    T_step    = compute + straggle + exchange + network + optimizer + other

Beyond the cores, exchange and optimizer take p / c times as long. N nodes of p workers
each: compute and straggle are of all N p workers, exchange and optimizer of one node's.
Of k partial sums of each node, its leader sends every other node the pieces that are
that one's to sum, then the sums of its own piece (reduce-scatter and all-gather, Thakur
et al. 2005: where k = 1, as many bytes as a ring all-reduce). Nothing overlaps it:

    network   = 2 latency + (k + 1) (N - 1) / N n (1 / bandwidth + tau) + rho n k
    network   = (N p - 1) (latency + n rows / bandwidth)                       (gloo)
        The ring of all workers enters and leaves each node once; the workers' own
        costs are those above, with N p for p.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from samestep.scaling.work_counts import Work, expected_maximum, work


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
class Model:
    """The formulas with their parameters."""

    parameters: Mapping[str, float]
    exchange: str
    cores: int
    gradient_bytes: int
    backward: float = 0.5
    """Share of the compute time that is backward pass (gloo's overlap)."""

    def slow(self, workers: int) -> float:
        """Return the factor by which so many workers slow each other down."""
        return 1 + self.parameters["kappa"] * (min(workers, self.cores) - 1)

    def crowd(self, workers: int) -> float:
        """Return workers per core, at least 1."""
        return max(1.0, workers / self.cores)

    def compute(self, done: Work, together: int) -> list[float]:
        """Return seconds of each rank, with `together` workers on its machine."""
        alpha, beta, rho = (self.parameters[k] for k in ("alpha", "beta", "rho"))
        n, slow = self.gradient_bytes, self.slow(together)
        return [
            slow * (alpha * m + beta * s + rho * n * a)
            for m, s, a in zip(
                done.micro_batches, done.samples, done.merges, strict=True
            )
        ]

    def step(
        self,
        workers: int,
        global_batch: int,
        micro_batches: int,
        nodes: int = 1,
        network: Network = NO_NETWORK,
    ) -> float:
        """Return seconds of a step on `nodes` like this machine, `workers` on each."""
        terms = self.terms(workers, global_batch, micro_batches, nodes, network)
        return sum(terms.values())

    def terms(
        self,
        workers: int,
        global_batch: int,
        micro_batches: int,
        nodes: int = 1,
        network: Network = NO_NETWORK,
    ) -> dict[str, float]:
        """Return seconds of a step by term."""
        done = work(workers, global_batch, micro_batches, nodes)
        each = self.compute(done, workers)
        by_node = [each[i : i + workers] for i in range(0, len(each), workers)]
        compute = max(max(each), max(map(sum, by_node)) / self.cores)
        micro_batch = max(each) / max(done.micro_batches)
        return {
            "compute": compute,
            "straggle": self.straggle(nodes * workers, compute),
            "exchange": self.exchange_seconds(done, micro_batch),
            "network": self.network_seconds(done, network),
            "optimizer": self.optimizer(workers),
            "other": self.parameters["o0"],
        }

    def straggle(self, workers: int, compute: float) -> float:
        """Return seconds until the unluckiest of so many workers arrives."""
        return self.parameters["nu"] * expected_maximum(workers) * sqrt(compute)

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

    def optimizer(self, workers: int) -> float:
        """Return seconds of the update on one machine."""
        u0, u1 = self.parameters["u0"], self.parameters["u1"]
        divided = u1 / workers if self.exchange == "shared" else u1
        return self.crowd(workers) * (u0 + divided)


def overlapped(hidden: float, network: float, q: float) -> float:
    """Return the seconds by which `network` outlasts `hidden`, which it overlaps."""
    return float((hidden**q + network**q) ** (1 / q) - hidden)
