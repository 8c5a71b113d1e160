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

import torch

from samestep.errors import WorkerLate
from samestep.messages.job import MeasurementJob
from samestep.messages.training import Measured, Ready
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Cadence, Decision
from samestep.training.timing import PHASES, by_phase
from samestep.training.train import train_epoch
from samestep.training.trainer import Report, Trainer


WARM, DONE = 1, 2
ADDITIONS = 50


class StepTimes(Heartbeat):
    """A heartbeat that also remembers when each step began."""

    def __init__(self, fd: int, rank: int) -> None:
        """Map the memory `fd`, as `Heartbeat` does."""
        super().__init__(fd, rank)
        self.began: list[float] = []

    def begin(self, step: int) -> None:
        """Begin a step, counted from 0."""
        self.began.append(time.perf_counter())
        super().begin(step)


class Gate:
    """How far several independent workers are: one cell each, which only it writes."""

    def __init__(self, fd: int, rank: int) -> None:
        """Map the memory `fd`, of 8 zeroed bytes per worker."""
        self._stages = memoryview(mmap.mmap(fd, 0)).cast("q")
        self._rank = rank

    def reach(self, stage: int) -> None:
        """Record that this worker has reached a stage."""
        self._stages[self._rank] = stage

    def all_at(self, stage: int) -> bool:
        """Return whether all workers have reached a stage."""
        return min(self._stages) >= stage


@dataclass
class TimedCadence(Cadence):
    """The cadence of a training that ends once `over` returns true on any worker."""

    over: Callable[[], bool] = lambda: False
    max_steps: int = 1 << 30
    """Steps between two calls of `over`, at most."""

    def decide(self, steps: int, epoch_ends: bool) -> Decision:
        """Decide as `Cadence` does, and to stop if it is over."""
        decision = super().decide(steps, epoch_ends)
        stop = decision.stop or self.over()
        return replace(decision, stop=stop, steps=min(decision.steps, self.max_steps))


@dataclass
class Measurement:
    """What one worker measured in some steps."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Seconds as in the `train_seconds` of a run."""
    workers: list[dict[str, float]] = field(default_factory=list)
    """Seconds by phase, of each worker."""
    step_seconds: list[float] = field(default_factory=list)

    def add_phases(self, workers: list[dict[str, float]]) -> None:
        """Add the seconds by phase of more steps."""
        before = self.workers or [dict.fromkeys(PHASES, 0.0) for _ in workers]
        self.workers = [
            {phase: old[phase] + seconds for phase, seconds in new.items()}
            for old, new in zip(before, workers, strict=True)
        ]


def measure(
    trainer: Trainer, times: StepTimes, report: Report, job: MeasurementJob
) -> None:
    """All workers of a group: warm up, then train for `job.seconds` and report."""
    trainer.report = lambda _: None
    report(Ready())
    train_until(trainer, times, seconds_passed(job.warm_up))
    measurement = train_until(trainer, times, seconds_passed(job.seconds))
    if trainer.topology.is_leader:
        report(_measured(trainer, measurement))


def measure_alone(
    trainer: Trainer,
    times: StepTimes,
    report: Report,
    job: MeasurementJob,
    gate: Gate,
) -> None:
    """Measure the only worker of its group, beside others of the same kind.

    All train until everyone has warmed up, and go on until everyone has measured, so
    each of them is measured while all others compute, too.
    """
    trainer.report = lambda _: None
    report(Ready())
    timeout = job.setup.hang_timeout
    train_until(trainer, times, seconds_passed(job.warm_up))
    gate.reach(WARM)
    train_until(trainer, times, eventually(lambda: gate.all_at(WARM), timeout), 1)
    measurement = train_until(trainer, times, seconds_passed(job.seconds))
    gate.reach(DONE)
    train_until(trainer, times, eventually(lambda: gate.all_at(DONE), timeout), 1)
    report(_measured(trainer, measurement))


def train_until(
    trainer: Trainer,
    times: StepTimes,
    over: Callable[[], bool],
    max_steps: int = 1 << 30,
) -> Measurement:
    """All workers of a group: train until `over`, for at least one step.

    At the end of the recipe the training starts over.
    """
    trainer.cadence = TimedCadence(times, 0.0, over=over, max_steps=max_steps)
    progress, plan = trainer.progress, trainer.samples.plan
    stopwatch = trainer.monitor.stopwatch
    stopwatch.take_epoch()
    measurement, stop = Measurement(), False
    per_sample = trainer.samples.data.targets_per_sample
    while not stop:
        progress.step %= trainer.recipe.epochs * plan.steps_per_epoch
        first, seconds = progress.step, progress.seconds
        targets = progress.epoch.targets
        times.began.clear()
        decision, record = train_epoch(trainer)
        stop = decision.stop
        measurement.steps += progress.step - first
        measurement.seconds += progress.seconds - seconds
        measurement.samples += (progress.epoch.targets - targets) // per_sample
        measurement.step_seconds += [b - a for a, b in pairwise(times.began)]
        if record:
            measurement.add_phases(record.times.workers)
            progress.begin_epoch()
    rest = stopwatch.take_epoch().seconds
    measurement.add_phases([by_phase(row) for row in rest])
    return measurement


def seconds_passed(seconds: float) -> Callable[[], bool]:
    """Return a function that returns whether `seconds` have passed since this call."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def eventually(condition: Callable[[], bool], timeout: float) -> Callable[[], bool]:
    """Return a function that calls `condition`, for at most `timeout` seconds.

    Later it raises WorkerLate while the condition does not hold.
    """
    end = time.monotonic() + timeout

    def check() -> bool:
        if condition():
            return True
        if time.monotonic() > end:
            raise WorkerLate(
                f"Independent workers must keep up with each other within {timeout:g} "
                "s; one did not. Is the machine busy with something else?"
            )
        return False

    return check


def _measured(trainer: Trainer, measurement: Measurement) -> Measured:
    exchange, flat = trainer.replica.exchange, trainer.replica.flat
    times = measurement.step_seconds
    return Measured(
        steps=measurement.steps,
        samples=measurement.samples,
        seconds=measurement.seconds,
        step_seconds_sd=statistics.stdev(times) if len(times) > 1 else 0.0,
        workers=measurement.workers,
        bytes_per_step=exchange.bytes_per_step,
        gradient_bytes=flat.dtype.itemsize * flat.size,
        add_seconds=adding_seconds(flat.size, flat.dtype),
        noise_scale=trainer.progress.noise.scale,
    )


def adding_seconds(size: int, dtype: torch.dtype) -> float:
    """Return the seconds it takes to add a gradient [size] to another.

    That is what each node of the canonical tree costs its owner.
    """
    total, gradient = torch.ones(2, size, dtype=dtype)
    began = time.perf_counter()
    for _ in range(ADDITIONS):
        total.add_(gradient)
    return (time.perf_counter() - began) / ADDITIONS
