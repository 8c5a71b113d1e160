"""A short measurement on a worker: the training's own steps, timed.

No evaluation and no snapshots. Two kinds: workers that train together, and independent
trainings of one worker each that run at the same time, whose total is the machine's own
parallel limit. The latter start and end together, by flags in shared memory.
"""

import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from samestep.config.recipe import Recipe
from samestep.errors import WorkerLate
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Cadence, Decision
from samestep.training.timing import PHASES, by_phase
from samestep.training.train import train_epoch
from samestep.training.trainer import Surroundings, Trainer, build


WARM, DONE = 1, 2
ADDITIONS = 50


class StepTimes(Heartbeat):
    """A board that also remembers when each step began."""

    def __init__(self, fd: int, rank: int) -> None:
        """As for a board."""
        super().__init__(fd, rank)
        self.began: list[float] = []

    def begin(self, step: int) -> None:
        """A step begins."""
        self.began.append(time.perf_counter())
        super().begin(step)


class Gate:
    """How far each of several independent workers is: one cell each, one writer."""

    def __init__(self, fd: int, rank: int) -> None:
        """`fd`: memory of 8 bytes per worker, zeroed."""
        self._stages = memoryview(mmap.mmap(fd, 0)).cast("q")
        self._rank = rank

    def reach(self, stage: int) -> None:
        """This worker is now at this stage."""
        self._stages[self._rank] = stage

    def all_at(self, stage: int) -> bool:
        """Whether everybody is at this stage or beyond."""
        return min(self._stages) >= stage


@dataclass
class Until(Cadence):
    """The training's rhythm, until a worker finds that it is `over`."""

    over: Callable[[], bool] = lambda: False
    most_steps: int = 1 << 30
    """Between two looks."""

    def decide(self, steps: int, epoch_ends: bool) -> Decision:
        """After `steps` more steps."""
        told = super().decide(steps, epoch_ends)
        stop, reach = told.stop or self.over(), min(told.steps, self.most_steps)
        return replace(told, stop=stop, steps=reach)


@dataclass
class Lap:
    """A stretch of training on one worker."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    """As in a training's `train_seconds`."""
    workers: list[dict[str, float]] = field(default_factory=list)
    """Seconds by phase, of each worker."""
    step_seconds: list[float] = field(default_factory=list)

    def add_phases(self, workers: list[dict[str, float]]) -> None:
        """The seconds by phase of more steps."""
        own = self.workers or [dict.fromkeys(PHASES, 0.0) for _ in workers]
        self.workers = [
            {phase: one.get(phase, 0.0) + seconds for phase, seconds in more.items()}
            for one, more in zip(own, workers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """For the supervisor."""
        times = self.step_seconds
        return {
            "steps": self.steps,
            "samples": self.samples,
            "seconds": self.seconds,
            "step_seconds_sd": statistics.stdev(times) if len(times) > 1 else 0.0,
            "workers": self.workers,
        }


def measure(
    recipe: Recipe, around: Surroundings, job: dict[str, Any], times: StepTimes
) -> None:
    """All workers of a group: warm up, then train for `job["seconds"]` and report."""
    trainer = build(recipe, replace(around, heartbeat=times))
    trainer.report = lambda _: None
    around.report({"type": "ready"})
    train_until(trainer, times, after(job["warm_up"]))
    lap = train_until(trainer, times, after(job["seconds"]))
    if trainer.topology.is_leader:
        around.report(_message(trainer, lap))


def measure_alone(
    recipe: Recipe,
    around: Surroundings,
    job: dict[str, Any],
    times: StepTimes,
    gate: Gate,
) -> None:
    """The only worker of its group, beside others of the same kind.

    All train until everybody has warmed up, and go on until everybody has measured, so
    that what is measured always has all of them for company.
    """
    trainer = build(recipe, replace(around, heartbeat=times))
    trainer.report = lambda _: None
    around.report({"type": "ready"})
    patience: float = job["hang_timeout"]
    train_until(trainer, times, after(job["warm_up"]))
    gate.reach(WARM)
    train_until(trainer, times, when(lambda: gate.all_at(WARM), patience), 1)
    lap = train_until(trainer, times, after(job["seconds"]))
    gate.reach(DONE)
    train_until(trainer, times, when(lambda: gate.all_at(DONE), patience), 1)
    around.report(_message(trainer, lap))


def train_until(
    trainer: Trainer,
    times: StepTimes,
    over: Callable[[], bool],
    most_steps: int = 1 << 30,
) -> Lap:
    """All workers of a group: at least one step; the recipe starts over at its end."""
    trainer.cadence = Until(trainer.heartbeat, 0.0, over=over, most_steps=most_steps)
    progress, plan = trainer.progress, trainer.plan
    trainer.stopwatch.take_epoch()
    lap, stop = Lap(), False
    per_sample = trainer.data.targets_per_sample
    while not stop:
        progress.step %= trainer.recipe.epochs * plan.steps_per_epoch
        first, seconds, targets = (
            progress.step,
            progress.seconds,
            progress.epoch.targets,
        )
        times.began.clear()
        told, record = train_epoch(trainer)
        stop = told.stop
        lap.steps += progress.step - first
        lap.seconds += progress.seconds - seconds
        lap.samples += (progress.epoch.targets - targets) // per_sample
        lap.step_seconds += [b - a for a, b in pairwise(times.began)]
        if record:
            lap.add_phases(record["workers"])
            progress.begin_epoch()
    rest = trainer.stopwatch.take_epoch().seconds
    lap.add_phases([by_phase(row) for row in rest])
    return lap


def after(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since the call."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def when(condition: Callable[[], bool], patience: float) -> Callable[[], bool]:
    """Whether it is so. Raises WorkerLate once it has not been for `patience` s."""
    end = time.monotonic() + patience

    def look() -> bool:
        if condition():
            return True
        if time.monotonic() > end:
            raise WorkerLate(
                f"Independent workers must keep up with each other within {patience:g} "
                "s; one did not. Is the machine busy with something else?"
            )
        return False

    return look


def _message(trainer: Trainer, lap: Lap) -> dict[str, Any]:
    return {
        "type": "measured",
        **lap.to_dict(),
        "bytes_per_step": trainer.exchange.bytes_per_step,
        "gradient_bytes": trainer.flat.dtype.itemsize * trainer.flat.size,
        "add_seconds": adding_seconds(trainer.flat.size, trainer.flat.dtype),
        "noise_scale": trainer.progress.noise.scale,
    }


def adding_seconds(size: int, dtype: torch.dtype) -> float:
    """Of adding one gradient [size] to another, as on the way up the tree."""
    total, gradient = torch.ones(2, size, dtype=dtype)
    began = time.perf_counter()
    for _ in range(ADDITIONS):
        total.add_(gradient)
    return (time.perf_counter() - began) / ADDITIONS
