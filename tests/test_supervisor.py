"""The supervisor's decisions, without workers: hangs, jobs, repeats, results."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import small_recipe
from test_checkpoint import LAYOUT, state_of

from samestep import Placement
from samestep.errors import (
    CheckpointError,
    Interrupted,
    NotReproducible,
    OutputError,
    PeerLost,
    SamestepError,
    WorkerFailed,
)
from samestep.messages.job import TrainingJob
from samestep.messages.training import (
    CaughtUp,
    CheckpointFailed,
    EpochRecord,
    Evaluated,
    EvaluationRecord,
    Failed,
    FaultInjected,
    Finished,
    GenerationFailed,
    LrTried,
    Measured,
    Message,
    Ready,
    SnapshotSaved,
    Started,
    StepRecord,
    TimeUse,
    Traced,
)
from samestep.output.console import SilentView
from samestep.output.events import EVENTS
from samestep.output.run import Settings
from samestep.output.run_writer import RunWriter
from samestep.output.sentences import sentence
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor import hangs
from samestep.supervisor.hangs import HangDetector
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import exception
from samestep.supervisor.recovery import Recovery, build_of
from samestep.supervisor.session import Session
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


# The session


class Scripted:
    """A training that reports what it is given, and ends in some way."""

    def __init__(
        self,
        session: Session,
        messages: list[Message],
        end: BaseException | None = None,
        state: State | None = None,
    ) -> None:
        self.session, self.messages, self.end = session, messages, end
        self.state, self.stop = state, Stop()
        self.layout: Layout | None = LAYOUT if state else None

    def build(self) -> dict[str, str]:
        return {"torch": "2"}

    def run(self) -> State | None:
        for message in self.messages:
            self.session.listen(message)
        if self.end is not None:
            raise self.end
        return self.state


class Noting(SilentView):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    where = Placement(workers=1, out=tmp_path / "run")
    recipe = small_recipe()
    with RunWriter.create(Settings.of(recipe, where), time.monotonic()) as writer:
        writer.start("started", {})
        yield Session(writer, recipe, where, Noting(), {"data": "00"})


STARTED = Started(
    step=0,
    steps_per_epoch=3,
    train_samples=30,
    parameters=7,
    layout=LAYOUT.to_dict(),
    conditions={"samples": "11"},
    torch="2",
    instruction_set="AVX2",
)
FINISHED = Finished(
    test_metrics={"test_loss": math.nan},
    weights_sha256="ab" * 32,
    balance={},
    data={},
    arithmetic="torch",
    best_epoch=2,
)


def test_the_result_has_the_fields_of_the_last_message(session: Session) -> None:
    messages: list[Message] = [
        STARTED,
        step_record(3),
        epoch_record(1, "aa" * 32),
        FINISHED,
    ]
    state = state_of(3)
    result = session.run(Scripted(session, messages, state=state), None).result
    assert result["status"] == "finished"
    assert result["weights_sha256"] == "ab" * 32
    assert result["best_epoch"] == 2
    assert "own_metrics" not in result
    (epoch,) = result["epochs"]
    assert epoch["weights_sha256"] == "aa" * 32
    assert "type" not in epoch
    lines = (session.writer.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["step", "epoch"]


def test_a_loss_that_is_not_finite_is_a_warning(session: Session) -> None:
    bad = epoch_record(1, validation_metrics={"validation_loss": math.inf})
    session.run(Scripted(session, [STARTED, bad, FINISHED], state=state_of(3)), None)
    view = session.view
    assert isinstance(view, Noting)
    assert [text.split(":")[0] for text in view.warnings] == [
        "the validation loss is inf",
        "the test loss is nan",
    ]


def test_an_error_is_in_the_result_with_its_rank(session: Session) -> None:
    error = WorkerFailed("it broke")
    error.details = {"rank": 2}
    with pytest.raises(WorkerFailed):
        session.run(Scripted(session, [STARTED], error), None)
    result = json.loads((session.writer.path / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "it broke")
    assert result["failed_rank"] == 2


def test_a_stop_without_a_checkpoint_is_an_error_to_train_again(
    session: Session,
) -> None:
    with pytest.raises(OutputError, match=r"before the first snapshot\. Nothing"):
        session.run(Scripted(session, [STARTED]), None)


def test_a_stop_with_a_checkpoint_says_how_to_go_on(session: Session) -> None:
    with pytest.raises(Interrupted, match=r"after step 3; go on with `samestep res"):
        session.run(Scripted(session, [STARTED], state=state_of(3)), None)


# What becomes of messages


def test_every_message_is_an_event_a_record_or_for_the_supervisor_alone() -> None:
    records = {StepRecord, EvaluationRecord, EpochRecord, Finished, SnapshotSaved}
    others = {Ready, Measured, LrTried, Evaluated, Traced, Failed}
    assert set(get_args(Message)) == set(EVENTS) | records | others
    assert not set(EVENTS) & (records | others)


def test_the_error_that_ends_the_training_is_left_to_the_command() -> None:
    def failed(final: bool | None) -> str | None:
        return sentence(
            GenerationFailed(final=final, error="it broke", worker=0, step=1)
        )

    assert failed(True) is None
    assert failed(False) == failed(None) == "failure: it broke"


def test_a_failed_checkpoint_is_named_by_its_step() -> None:
    text = sentence(CheckpointFailed(step=7, error="No space left on device"))
    assert text is not None
    assert text.startswith("the checkpoint of step 7 cannot be written: No space")
