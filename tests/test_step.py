"""One step: what its instruments see, how its gradient is scaled, when workers sync."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from samestep.core.gradient_noise import Watch
from samestep.core.topology import Topology
from samestep.models.device import Device
from samestep.optim import gradients
from samestep.state.hashing import StepHashes
from samestep.state.layout import BLOCK
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import MAX_RARITY, Cadence, Decision
from samestep.training.metrics import MetricsBuffer
from samestep.training.monitor import StepMonitor
from samestep.training.timing import PHASES, Clock


class Alone:
    """An exchange with oneself, of a gradient of two blocks."""

    workers = 1
    parameters = torch.zeros(2 * BLOCK)
    owned = (0, 2 * BLOCK)
    bytes_per_step, network_bytes_per_step = 100, 10

    def __init__(self) -> None:
        self.watch = Watch(1, 1)

    def merge(self, values: Tensor) -> Tensor:
        """Return the values: there is no other worker to fill a cell."""
        return values

    merge_slices = merge


class Calls:
    """Records the calls of the methods of an instrument."""

    def __init__(self, calls: list[str], instrument: Any, *methods: str) -> None:
        self._calls, self._instrument, self._methods = calls, instrument, methods

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._instrument, name)
        if name not in self._methods:
            return method

        def call(*args: Any) -> Any:
            self._calls.append(" ".join([name, *map(str, args)]))
            return method(*args)

        return call


def monitor(calls: list[str]) -> StepMonitor:
    exchange: Any = Alone()
    clock: Any = Calls(calls, Clock(), "lap")
    board = Heartbeat(Heartbeat.create(1))
    heartbeat: Any = Calls(calls, board, "begin", "beat", "at_barrier")
    faults: Any = Calls(calls, Faults(0, []), "at")
    metrics = MetricsBuffer(1, 5, Topology.on_one_node(0, 1), exchange, 1)
    return StepMonitor(clock, heartbeat, faults, metrics, None, exchange, Device())


def take_step(monitor: StepMonitor, step: int, loss: float) -> None:
    monitor.begin_step(step, num_targets=4)
    monitor.begin_micro_batch()
    monitor.lap("data")
    monitor.lap("forward")
    monitor.end_micro_batch(0, torch.tensor(loss), torch.tensor([3.0]), 4)
    monitor.begin_exchange()
    monitor.end_exchange()
    monitor.end_update(StepHashes(step << 60, 2**64 - 1))
    monitor.end_step()


def test_instruments_see_a_step_in_this_order() -> None:
    calls: list[str] = []
    take_step(monitor(calls), 7, 1.0)
    assert calls == [
        "begin 7",
        "lap other",
        "beat",
        "at forward 7",
        "lap data",
        "lap forward",
        "lap backward",
        "at exchange 7",
        "at_barrier",
        "lap exchange",
        "at update 7",
        "lap optimizer",
        "at_barrier",
        "lap exchange",
    ]


def test_a_sync_returns_what_the_steps_since_the_last_one_recorded() -> None:
    steps = monitor([])
    for count in (2, 1):
        for step in range(count):
            take_step(steps, step, step + 1.0)
        decision = Decision(stop=False, save=True, steps=3)
        merged = steps.sync(steps.take_phases(), decision)
        sums, times = merged.sums, merged.times
        assert [each.loss for each in sums] == [1.0, 2.0][:count]
        assert [each.metrics for each in sums] == [[3.0]] * count
        assert merged.hashes == [(0, 2**64 - 1), (1 << 60, 2**64 - 1)][:count]
        assert (times.bytes, times.network_bytes) == (100 * count, 10 * count)
        assert times.seconds.shape == (1, len(PHASES))
        assert merged.decision == decision


def test_a_gradient_is_divided_by_what_the_losses_counted() -> None:
    gradient, counts = torch.full((4,), 6.0), torch.tensor([1.0, 2.0]).double()
    factor, sizes = gradients.rescale_to_counts(gradient, counts, 12, 6)
    assert factor == 4.0
    assert sizes == [2.0, 4.0]
    assert gradient.tolist() == [24.0] * 4


def test_a_gradient_over_no_target_is_zero() -> None:
    gradient = torch.full((4,), float("nan"))
    none = torch.zeros(2, dtype=torch.float64)
    assert gradients.rescale_to_counts(gradient, none, 12, 6) == (0.0, [0.0, 0.0])
    assert gradient.tolist() == [0.0] * 4


def test_clipping_scales_a_gradient_down_and_never_up() -> None:
    exchange: Any = Alone()
    gradient = torch.zeros(2 * BLOCK)
    gradient[0], gradient[-1] = 3.0, 4.0
    gradients.clip(gradient, 10.0, exchange)
    assert gradient.norm().item() == 5.0
    gradients.clip(gradient, 1.0, exchange)
    assert gradient.norm().item() == pytest.approx(1.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, as the only element; it stands still until it is changed."""
    now = [time.monotonic()]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_workers_sync_after_a_fifth_of_a_second_of_steps(clock: list[float]) -> None:
    cadence = Cadence(Heartbeat(Heartbeat.create(1)), 0.0)
    cadence.decide(1, epoch_ends=False)
    for seconds, expected in [(0.05, 4), (0.5, 1), (0.001, 200)]:
        clock[0] += 8 * seconds
        decision = cadence.decide(8, epoch_ends=False)
        assert abs(decision.steps - expected) <= 1
        assert not decision.save


def test_snapshots_that_take_long_become_rarer(clock: list[float]) -> None:
    cadence = Cadence(Heartbeat(Heartbeat.create(1)), snapshot_seconds=0.5)
    clock[0] += 0.6
    assert cadence.decide(1, epoch_ends=False).save
    cadence.saved(seconds=0.1)
    clock[0] += 9
    assert not cadence.decide(1, epoch_ends=False).save
    clock[0] += 2
    assert cadence.decide(1, epoch_ends=False).save
    cadence.saved(seconds=100.0)
    clock[0] += MAX_RARITY * 0.5 + 1  # however long it took
    assert cadence.decide(1, epoch_ends=False).save


def test_an_epoch_ends_with_a_snapshot_unless_there_are_none(
    clock: list[float],
) -> None:
    heartbeat = Heartbeat(Heartbeat.create(1))
    for snapshot_seconds in (60.0, 0.0):
        cadence = Cadence(heartbeat, snapshot_seconds)
        clock[0] += 1
        decision = cadence.decide(1, epoch_ends=True)
        assert decision.save == (snapshot_seconds > 0)


def test_a_request_to_stop_reaches_the_decision() -> None:
    heartbeat = Heartbeat(Heartbeat.create(1))
    cadence = Cadence(heartbeat, 0.0)
    assert not cadence.decide(1, epoch_ends=False).stop
    heartbeat.request_stop()
    assert cadence.decide(1, epoch_ends=False).stop
