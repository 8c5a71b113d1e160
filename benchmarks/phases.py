"""What it costs to know where the time goes: steps with and without the measuring.

    python benchmarks/phases.py

One worker in this process takes steps of mnist-mlp, in blocks of 100, in turn with
everything that is measured (the clock of the phases, and the watch on the
micro-batches' gradients every 25 steps) and with neither. Each pair of blocks gives a
ratio; evaluation, snapshots and the merging of losses are left out of both.
"""

import argparse
import time
from typing import Literal, NamedTuple

import cleanup
import numpy as np
import torch

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.core import gradient_noise
from samestep.core.ownership import Share
from samestep.core.topology import Topology
from samestep.exchange.shared import SharedExchange
from samestep.state.flat import Flat
from samestep.supervisor.job import make_setup
from samestep.system import barrier, shared_memory
from samestep.system.barrier import Waits
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.training import train
from samestep.training.build import build_trainer
from samestep.training.timing import Clock
from samestep.training.trainer import Trainer, WorkerContext, steps_per_report


class NoClock(Clock):
    """Reads no time."""

    def lap(self, phase: str) -> float:
        """Nothing."""
        return 0.0


class NoWatch(gradient_noise.Watch):
    """Never watches."""

    def begin(self, step: int) -> None:
        """Nothing."""


class Memory(NamedTuple):
    """What workers have in common, made before they are forked."""

    exchange: int
    snapshots: int
    heartbeat: int

    @classmethod
    def of(cls, workers: int) -> "Memory":
        """Make it."""
        exchange, heartbeat = barrier.create(workers), Heartbeat.create(workers)
        return cls(exchange, shared_memory.create(), heartbeat)


class Connection(NamedTuple):
    """Connects workers without a supervisor."""

    topology: Topology
    memory: Memory
    is_hashed: bool

    def __call__(self, flat: Flat, shares: list[Share]) -> SharedExchange:
        """Make the exchange."""
        fd, waits = self.memory.exchange, Waits(1e-3, 60.0)
        exchange = SharedExchange(flat, shares, self.topology, fd, waits)
        exchange.is_first = self.is_hashed
        return exchange

    def meet(self, done: str) -> None:
        """Nothing."""


def built(
    recipe: Recipe,
    topology: Topology,
    memory: Memory,
    is_hashed: bool = True,
    micro_batches: bool = False,
) -> Trainer:
    """Build a worker without a supervisor.

    Perhaps without hashes for a ledger, or with those of micro-batches.
    """
    kind: Literal["steps", "micro-batches"]
    kind = "micro-batches" if micro_batches else "steps"
    placement = Placement(workers=topology.workers, ledger=kind)
    context = WorkerContext(
        setup=make_setup(recipe, placement),
        recipe=recipe,
        topology=topology,
        fds={"snapshots": memory.snapshots},
        connect=Connection(topology, memory, is_hashed),
        report=lambda _: None,
        heartbeat=Heartbeat(memory.heartbeat, topology.rank),
        faults=Faults(topology.rank, []),
    )
    return build_trainer(context)


def alone(recipe: Recipe) -> Trainer:
    """Build the only worker."""
    return built(recipe, Topology.on_one_node(0, 1), Memory.of(1))


def block(trainer: Trainer, start: int, steps: int) -> float:
    """Return the seconds of so many steps from `start`."""
    monitor = trainer.monitor
    began = time.perf_counter()
    for step in range(start, start + steps):
        if monitor.metrics.num_steps == steps_per_report(trainer.samples.plan):
            monitor.sync(monitor.clock.take(), trainer.cadence.decide(1, False))
        train.train_step(trainer, step)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=100, help="of a block")
    options = parser.parse_args()
    pairs, steps = int(options.pairs), int(options.steps)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trainer = alone(Recipe.load("mnist-mlp"))
    monitor, exchange = trainer.monitor, trainer.replica.exchange
    modes = {
        "on": (monitor.clock, exchange.watch),
        "off": (NoClock(), NoWatch(1, 0)),
    }
    ratios = []
    for pair in range(-2, pairs):
        seconds = {}
        for name in ("on", "off")[:: 1 if pair % 2 else -1]:
            monitor.clock, exchange.watch = modes[name]
            seconds[name] = block(trainer, 800 * (pair + 2) // 100 * 100, steps)
        if pair >= 0:
            ratios.append(seconds["on"] / seconds["off"])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    print(
        f"on/off: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}, "
        f"n={pairs} pairs of {steps} steps"
    )


if __name__ == "__main__":
    cleanup.run(main)
