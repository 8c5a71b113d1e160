"""The supervisor's decisions, without workers: hangs, jobs, repeats."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe
from test_checkpoint import LAYOUT, state_of

from samestep import Placement
from samestep.errors import (
    CheckpointError,
    NotReproducible,
    PeerLost,
    SamestepError,
    WorkerFailed,
)
from samestep.messages.job import TrainingJob
from samestep.messages.training import (
    CaughtUp,
    EpochRecord,
    Failed,
    FaultInjected,
    Message,
    StepRecord,
    TimeUse,
)
from samestep.supervisor import hangs
from samestep.supervisor.hangs import HangDetector
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import exception
from samestep.supervisor.recovery import Recovery, build_of
from samestep.supervisor.snapshot_memory import SnapshotMemory, check_same, of_step
from samestep.system import fault_injection
from samestep.system.barrier import CROWDED_SPIN_SECONDS, SPIN_SECONDS
from samestep.system.fault_injection import Fault
from samestep.system.heartbeat import LOADING, MEETING, Heartbeat
from samestep.system.signals import Stop


TIMES = TimeUse(
    workers=[{"data": 1.0}],
    waited_for=[0.0],
    communication_share=0.0,
    straggler_share=0.0,
    bytes_exchanged=0,
    network_bytes=0,
)


def step_record(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(
        epoch=1,
        step=step,
        metrics={"loss": loss},
        lr=0.1,
        samples_per_second=100.0,
        times=TIMES,
        noise_scale=None,
        speeds=[1.0],
        shares=[6],
    )


def epoch_record(epoch: int, sha256: str = "00" * 32, **fields: Any) -> EpochRecord:
    return EpochRecord(
        epoch=epoch,
        step=epoch,
        seconds=1.0,
        train_metrics={"train_loss": 0.5},
        samples_per_second=100.0,
        seconds_by_phase={"data": 1.0},
        times=TIMES,
        noise_scale=None,
        weights_sha256=sha256,
        **fields,
    )


# Hangs


class Board:
    """The heartbeats of two workers, and a watch with a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped: int | None) -> None:
        self.fd = Heartbeat.create(2)
        self.workers = [Heartbeat(self.fd, rank) for rank in (0, 1)]
        self.now = 0.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.detector = HangDetector(
            Heartbeat(self.fd), 10.0, 100.0, lambda rank: rank == stopped
        )

    def late_after(self, seconds: float) -> list[int]:
        self.now += seconds
        return self.detector.late()

    def take_a_step(self) -> None:
        for worker in self.workers:
            worker.beat()
            worker.at_barrier()


BoardOf = Callable[..., Board]


@pytest.fixture
def board_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[BoardOf]:
    boards: list[Board] = []

    def make(stopped: int | None = None) -> Board:
        boards.append(Board(monkeypatch, stopped))
        return boards[-1]

    yield make
    for board in boards:
        os.close(board.fd)


def test_the_worker_that_is_furthest_behind_is_late(board_of: BoardOf) -> None:
    board = board_of()
    board.take_a_step()
    assert board.late_after(0.0) == []
    board.workers[0].at_barrier()
    assert board.late_after(1.0) == []
    assert board.late_after(9.9) == []
    assert board.late_after(0.2) == [1]
    assert "within 10 s; late: worker 1." in board.detector.complaint("1")


def test_a_worker_may_take_five_times_the_longest_pause_so_far(
    board_of: BoardOf,
) -> None:
    board = board_of()
    board.take_a_step()
    board.late_after(0.0)
    board.take_a_step()
    board.late_after(8.0)
    assert board.late_after(39.0) == []
    assert board.late_after(1.1) == [0, 1]


def test_a_start_has_a_timeout_of_its_own(board_of: BoardOf) -> None:
    board = board_of()
    board.workers[0].enter(MEETING)
    board.workers[1].enter(LOADING)
    assert board.late_after(0.0) == []
    assert board.detector.slow_start() is None
    assert board.late_after(11.0) == []
    slow = board.detector.slow_start()
    assert slow is not None
    assert (slow.phase, slow.waited, slow.patience) == ("loading the data", 11, 100)
    assert board.detector.slow_start() is None  # once per phase
    assert board.late_after(90.0) == [1]
    assert "has been loading the data for longer" in board.detector.complaint("1")


def test_a_worker_that_is_stopped_while_it_starts_is_late_earlier(
    board_of: BoardOf,
) -> None:
    board = board_of(stopped=0)
    assert board.late_after(0.0) == []
    assert board.late_after(11.0) == [0]
    assert "within 10 s" in board.detector.complaint("0 (stopped by a signal)")


def test_a_stopped_process_is_recognised() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as process:
        assert not hangs.is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 10
        while not hangs.is_stopped(process.pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert hangs.is_stopped(process.pid)
        process.kill()
    assert not hangs.is_stopped(process.pid)


# Jobs


def test_a_fixed_balance_is_a_list_for_every_worker() -> None:
    """Also for one that gets its job without a socket, under torchrun."""
    setup = make_setup(small_recipe(), Placement(workers=2, balance=(4, 2)))
    assert setup.balance == [4, 2]
    assert make_setup(small_recipe(), Placement(workers=2)).balance == "auto"


def test_workers_that_share_cores_spin_for_less_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("samestep.system.barrier.usable_cores", lambda: (2, ""))
    spins = [
        make_setup(small_recipe(), Placement(workers=n)).spin_seconds for n in (2, 3)
    ]
    assert spins == [SPIN_SECONDS, CROWDED_SPIN_SECONDS]


def test_faults_for_the_workers_come_from_the_schedule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fault = Fault(number=1, kind="kill", point="update", step=3, rank=0)
    (tmp_path / "faults.json").write_text(json.dumps([vars(fault)]))
    monkeypatch.setenv(fault_injection.SCHEDULE, str(tmp_path / "faults.json"))
    assert make_setup(small_recipe(), Placement(workers=1)).faults == [fault]


# Failures


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        ("WorkerFailed", WorkerFailed, "Worker 1 failed: it broke."),
        ("PeerLost", PeerLost, "it broke"),
        ("NoSuchError", WorkerFailed, "Worker 1 failed: it broke."),
    ],
)
def test_the_exception_of_a_worker_is_raised_again(
    error: str, kind: type[SamestepError], text: str
) -> None:
    failure = Failed(
        error=error, message="it broke", traceback="Traceback", own="mine.py", code=-9
    )
    raised = exception(failure, 1)
    assert type(raised) is kind
    assert str(raised) == text
    assert raised.details == {"rank": 1, "code": -9, "traceback": "Traceback"}
    assert raised.__notes__ == ["mine.py"]


class Server:
    """A fork server that fails some times before it answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def build(self, device: str) -> dict[str, str]:
        if self.failures:
            self.failures -= 1
            error = WorkerFailed(f"failure {self.failures}")
            error.details = {"code": -9}
            raise error
        return {"device": device}


def test_a_fork_server_that_fails_is_asked_again() -> None:
    reported: list[SamestepError] = []
    server: Any = Server(failures=2)
    assert build_of(server, "cpu", 2, reported.append) == {"device": "cpu"}
    assert len(reported) == 2
    server = Server(failures=3)
    with pytest.raises(WorkerFailed, match="2 restarts made no progress"):
        build_of(server, "cpu", 2)


# What a generation reports


NO_MEMORY = SnapshotMemory(-1, -1, workers=1, layout=None)


@pytest.fixture
def heard() -> list[Message]:
    return []


@pytest.fixture
def training(heard: list[Message], tmp_path: Path) -> Recovery:
    faults = [
        Fault(number=number, kind="kill", point="update", step=3, rank=0)
        for number in (1, 2)
    ]
    setup = make_setup(small_recipe(), Placement(workers=1))
    job = TrainingJob(setup=replace(setup, faults=faults))
    server: Any = None
    return Recovery(
        server=server,
        job=job,
        workers=1,
        min_workers=1,
        max_restarts=3,
        logs=tmp_path,
        stop=Stop(),
        state=None,
        layout=None,
        listen=heard.append,
        offer=lambda *_: None,
    )


def test_a_record_is_passed_on_once(training: Recovery, heard: list[Message]) -> None:
    records: list[Message] = [step_record(1), step_record(2), epoch_record(1)]
    for message in [*records, *records, step_record(3)]:
        training._receive(message, NO_MEMORY)
    assert heard == [*records, step_record(3)]


def test_another_result_of_the_same_step_ends_the_training(
    training: Recovery,
) -> None:
    training._receive(step_record(1, loss=0.5), NO_MEMORY)
    training._receive(epoch_record(1, "aa"), NO_MEMORY)
    with pytest.raises(NotReproducible, match=r"the loss of step 1 was 0\.5 "):
        training._receive(step_record(1, loss=0.25), NO_MEMORY)
    with pytest.raises(
        NotReproducible, match="the fingerprint of epoch 1 was aa before"
    ):
        training._receive(epoch_record(1, "bb"), NO_MEMORY)


def test_a_fault_that_has_happened_is_not_in_the_next_job(
    training: Recovery, heard: list[Message]
) -> None:
    message = FaultInjected(number=1, kind="kill", point="update", step=3, rank=0)
    training._receive(message, NO_MEMORY)
    assert [fault.number for fault in training.job.setup.faults] == [2]
    assert heard == [message]


def test_progress_beyond_the_failure_is_reported_once(
    training: Recovery, heard: list[Message], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 7.5)
    training._failed = (5.0, 3)
    for step in (2, 3, 4):
        training._receive(step_record(step), NO_MEMORY)
    assert [m for m in heard if isinstance(m, CaughtUp)] == [
        CaughtUp(step=3, after=2.5)
    ]


def test_a_model_that_was_saved_with_other_parameters_is_refused() -> None:
    check_same(LAYOUT, LAYOUT)
    other = LAYOUT.model_copy(update={"dtype": "float64"})
    with pytest.raises(CheckpointError, match="other dtype: float32 then, float64"):
        check_same(LAYOUT, other)


def test_a_slot_that_was_written_again_is_not_the_state_of_its_step() -> None:
    state = state_of(4)
    assert of_step(state, 4) is state
    assert of_step(state, 3) is None
    assert of_step(None, 3) is None
