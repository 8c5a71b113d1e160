"""The instruments of a step, behind one object.

The clock, the heartbeat, the metrics, the byte counters, the faults that tests inject
and the check for mutations: all of them watch the step, and none takes part in it.
A step may take 2 ms, so the calls between its lines are plain methods; a context
manager for each phase would cost more than what it measures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samestep.core.ownership import Share
from samestep.exchange import Exchange
from samestep.models.device import Device
from samestep.state.hashing import StepHashes
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Decision
from samestep.training.metrics import Merged, MetricsBuffer
from samestep.training.timing import Clock, Times
from samestep.verification.mutation_check import MutationCheck


@dataclass
class StepMonitor:
    """Watch the steps of one worker.

    A step calls, in this order: `begin_step`; for each micro-batch
    `begin_micro_batch`, `lap("data")`, `lap("forward")` and `end_micro_batch`; then
    `begin_exchange`, `end_exchange`, `end_update` and `end_step`.
    """

    clock: Clock
    heartbeat: Heartbeat
    faults: Faults
    metrics: MetricsBuffer
    mutation_check: MutationCheck | None
    """None for built-in models."""
    exchange: Exchange
    device: Device

    def __post_init__(self) -> None:
        """Begin to count."""
        self.epoch_times = Times.zero(self.exchange.workers)
        """The times of the steps since the last record of an epoch."""
        self.logged_times = Times.zero(self.exchange.workers)
        """And since the last record of some steps."""
        self._step = self._row = 0
        self._arrived = 0.0
        self._bytes = self._network_bytes = 0

    def begin_step(self, step: int, num_targets: int) -> None:
        """Begin a step over `num_targets` targets; `step` counts from 0."""
        self._step = step
        self._row = self.metrics.begin_step(step, num_targets)
        self.heartbeat.begin(step)
        self.clock.begin(step)
        self.exchange.watch.begin(step)
        self._arrived = self.clock.lap("other")

    def begin_micro_batch(self) -> None:
        """Begin one of the worker's own micro-batches, or all of them together."""
        self.heartbeat.beat()
        self.faults.at("forward", self._step)

    def lap(self, phase: str) -> float:
        """End a phase of the step and begin the next; return the time, in seconds."""
        self._arrived = self.clock.lap(phase)
        return self._arrived

    def end_micro_batch(
        self, index: int, loss: Tensor, metrics: Tensor, num_samples: int
    ) -> None:
        """Record the loss [] and the metrics [cells] of a micro-batch.

        Raises NotReproducible if its passes changed what they must not.
        """
        if self.mutation_check is not None:
            # A micro-batch without samples never reaches the model.
            self.mutation_check.check(passes=int(num_samples > 0))
        self.metrics.record(self._row, index, loss.item(), metrics.tolist())
        self.lap("backward")

    def record(self, index: int, loss: float, metrics: list[float]) -> None:
        """Record the loss and the metrics of a micro-batch."""
        self.metrics.record(self._row, index, loss, metrics)

    def record_hash(self, index: int, number: int) -> None:
        """Record the hash of a micro-batch's own gradient."""
        self.metrics.hash_micro_batch(self._row, index, number)

    def recorded(self, micro_batches: Share) -> NDArray[np.float64]:
        """Return the loss and the metrics of some of the worker's micro-batches."""
        return self.metrics.recorded(self._row, micro_batches)

    def read_less(self, num_bytes: int) -> None:
        """Note how many bytes less all workers together read in this step."""
        self._bytes -= num_bytes

    def begin_exchange(self) -> None:
        """Record that this worker's gradients are ready; it waits for the others."""
        self.metrics.arrive(self._row, self._arrived)
        self.faults.at("exchange", self._step)
        self.heartbeat.at_barrier()

    def counts(self) -> Tensor:
        """All workers: return what each micro-batch's loss counted, float64 [M]."""
        return self.metrics.counts(self._row)

    def end_exchange(self) -> None:
        """Charge what the sum of the gradients took."""
        self._bytes += self.exchange.bytes_per_step
        self._network_bytes += self.exchange.network_bytes_per_step
        # A GPU only queues work: without waiting, the exchange would be charged to
        # the phase that happens to wait next.
        self.device.finish()
        self.clock.lap("exchange")
        self.faults.at("update", self._step)

    def end_update(self, hashes: StepHashes) -> None:
        """Charge what the optimizer took; the worker waits for the others again.

        `hashes` is what this worker adds to those of the step.
        """
        self.metrics.hash(self._row, hashes)
        self.clock.lap("optimizer")
        self.heartbeat.at_barrier()

    def end_step(self) -> None:
        """Charge what the exchange of parameters took."""
        self.clock.lap("exchange")

    def take_phases(self) -> list[float]:
        """Return this worker's seconds by phase since the last call; see PHASES.

        The worker then waits for the others, in `sync`.
        """
        self.heartbeat.at_barrier()
        return self.clock.take()

    def sync(self, phases: Sequence[float], decision: Decision) -> Merged:
        """All workers: merge what each of them recorded since the last call.

        Raises NonFiniteLoss, on all workers.
        """
        merged = self.metrics.sync(phases, decision)
        times = merged.times
        times.bytes, self._bytes = self._bytes, 0
        times.network_bytes, self._network_bytes = self._network_bytes, 0
        self.epoch_times.add(times)
        self.logged_times.add(times)
        return merged
