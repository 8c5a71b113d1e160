"""The supervisor's session: what a training leaves in its result and its events."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from conftest import small_recipe
from test_checkpoint import LAYOUT, state_of
from test_supervisor import epoch_record, step_record

from samestep import Placement
from samestep.errors import (
    Interrupted,
    OutputError,
    WorkerFailed,
)
from samestep.messages.training import (
    CheckpointFailed,
    EpochRecord,
    Evaluated,
    EvaluationRecord,
    Failed,
    Finished,
    GenerationFailed,
    LrTried,
    Measured,
    Message,
    Ready,
    SnapshotSaved,
    Started,
    StepRecord,
    Traced,
)
from samestep.output.console import SilentView
from samestep.output.events import EVENTS
from samestep.output.run import Settings
from samestep.output.run_writer import RunWriter
from samestep.output.sentences import sentence
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.supervisor.session import Session
from samestep.system.signals import Stop


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
