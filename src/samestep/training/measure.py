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
from torch import Tensor

from samestep.errors import WorkerLate
from samestep.messages.job import MeasurementJob
from samestep.messages.training import Measured, Ready
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Cadence, Decision
from samestep.training.timing import by_phase
from samestep.training.train import train_steps
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

    def reach(self, stage: int, timeout: float) -> Callable[[], bool]:
        """Record a stage; return a function that returns whether all have reached it.

        After `timeout` seconds that raises WorkerLate while one has not.
        """
        self._stages[self._rank] = stage
        end = time.monotonic() + timeout

        def have_all_reached() -> bool:
            if min(self._stages) >= stage:
                return True
            if time.monotonic() > end:
                raise WorkerLate(
                    "Independent workers must keep up with each other within "
                    f"{timeout:g} s; one did not. Is the machine busy with something "
                    "else?"
                )
            return False

        return have_all_reached


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

    phases: Tensor
    """Seconds by phase of each worker, float64 [workers, phases]."""
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Seconds as in the `train_seconds` of a run."""
    step_seconds: list[float] = field(default_factory=list)


def measure(
    trainer: Trainer,
    times: StepTimes,
    report: Report,
    job: MeasurementJob,
    gate: Gate | None = None,
) -> None:
    """All workers of a group: warm up, then train for `job.seconds` and report.

    With a `gate` this is the only worker of its group, beside others of the same kind.
    All train until everyone has warmed up, and go on until everyone has measured, so
    each of them is measured while all others compute, too.
    """
    trainer.report = lambda _: None
    report(Ready())
    timeout = job.setup.hang_timeout
    train_until(trainer, times, seconds_passed(job.warm_up))
    if gate is not None:
        train_until(trainer, times, gate.reach(WARM, timeout), 1)
    measurement = train_until(trainer, times, seconds_passed(job.seconds))
    if gate is not None:
        train_until(trainer, times, gate.reach(DONE, timeout), 1)
    if trainer.topology.is_leader:
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
    progress = trainer.progress
    phases = torch.zeros_like(trainer.monitor.epoch_times.take().seconds)
    measurement, stop = Measurement(phases), False
    per_sample = trainer.samples.data.targets_per_sample
    while not stop:
        if trainer.samples.plan.steps_per_epoch:  # a stream goes on
            progress.step %= trainer.num_steps
        first, seconds = progress.step, progress.seconds
        targets = progress.epoch.targets
        times.began.clear()
        decision = train_steps(trainer)
        stop = decision.stop
        measurement.steps += progress.step - first
        measurement.seconds += progress.seconds - seconds
        measurement.samples += (progress.epoch.targets - targets) // per_sample
        measurement.step_seconds += [b - a for a, b in pairwise(times.began)]
        if trainer.ends_epoch(progress.step):
            progress.begin_epoch()
    measurement.phases += trainer.monitor.epoch_times.take().seconds
    return measurement


def seconds_passed(seconds: float) -> Callable[[], bool]:
    """Return a function that returns whether `seconds` have passed since this call."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _measured(trainer: Trainer, measurement: Measurement) -> Measured:
    exchange, flat = trainer.replica.exchange, trainer.replica.flat
    times = measurement.step_seconds
    return Measured(
        steps=measurement.steps,
        samples=measurement.samples,
        seconds=measurement.seconds,
        step_seconds_sd=statistics.stdev(times) if len(times) > 1 else 0.0,
        workers=[by_phase(row) for row in measurement.phases],
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
