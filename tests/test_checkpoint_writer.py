"""Writing checkpoints: which are kept, and what no error may end."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, small_recipe
from test_checkpoint import BUILD, LAYOUT, RECIPE, newest, state_of, write
from test_resume import forget_after, resume

from samestep.core.ownership import spaced
from samestep.messages.training import CheckpointFailed, CheckpointWritten
from samestep.output.fence import Fence
from samestep.state import checkpoint
from samestep.state.snapshot import State
from samestep.supervisor.checkpoint_writer import CheckpointWriter, Offer
from samestep.supervisor.forkserver_client import ForkServer


Report = CheckpointWritten | CheckpointFailed


def checkpoints_of(
    run: Path, report: Callable[[Report], None] = lambda _: None
) -> CheckpointWriter:
    return CheckpointWriter(run, RECIPE, BUILD, report, Fence(run, 1))


def keep(run: Path, losses: list[float | None]) -> tuple[list[int], list[Report]]:
    """Write one checkpoint after each epoch with these validation losses."""
    reports: list[Report] = []
    directory = checkpoint.directory_of(run)
    with checkpoints_of(run, reports.append) as kept:
        for index in range(len(losses)):
            epochs: list[dict[str, Any]] = [
                {"epoch": e + 1} | ({"validation_loss": loss} if loss else {})
                for e, loss in enumerate(losses[: index + 1])
            ]
            state = state_of(index + 1)
            state.progress["epoch"] = {"loss": 0.0, "metrics": [], "targets": 0}
            state.progress["validation_loss"] = losses[index]
            assert kept.write(state, LAYOUT, epochs)
    return checkpoint.steps(directory), reports


def test_the_newest_two_and_the_best_are_kept(tmp_path: Path) -> None:
    assert keep(tmp_path / "a", [0.5, 0.2, 0.4, 0.3, 0.6])[0] == [2, 4, 5]
    assert keep(tmp_path / "b", [0.5, 0.4, 0.3])[0] == [2, 3]
    assert keep(tmp_path / "c", [None, None, None])[0] == [2, 3]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(
    tmp_path: Path,
) -> None:
    directory = checkpoint.directory_of(tmp_path)
    for step in (1, 2):
        write(directory, step)
    damaged = directory / "step-2" / checkpoint.MODEL
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with checkpoints_of(tmp_path) as writer:
        assert writer.write(state_of(3), LAYOUT, [])
    assert checkpoint.steps(directory) == [1, 2, 3]  # 1 is the second valid one


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    directory = checkpoint.directory_of(tmp_path)
    (directory / ".step-7.123.tmp").mkdir(parents=True)
    with checkpoints_of(tmp_path):
        assert not list(directory.iterdir())


def test_a_failing_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    directory = checkpoint.directory_of(tmp_path)
    reports: list[Report] = []
    with checkpoints_of(tmp_path, reports.append) as writer:
        assert writer.write(state_of(1), LAYOUT, [])
        directory.rename(tmp_path / "away")
        directory.write_text("not a directory")
        assert not writer.write(state_of(2), LAYOUT, [])
        directory.unlink()
        (tmp_path / "away").rename(directory)
        assert writer.write(state_of(3), LAYOUT, [])
    kinds = [CheckpointWritten, CheckpointFailed, CheckpointWritten]
    assert [type(report) for report in reports] == kinds
    assert reports[1].step == 2
    assert newest(directory) == (3, [])


@pytest.mark.parametrize("point", ["reading", "writing"])
def test_no_error_ends_the_writing_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Such as a lack of memory, once."""
    reports: list[Report] = []
    happened = threading.Event()
    real, failures = checkpoint.write, [MemoryError(), OSError(28, "full")]

    def report(message: Report) -> None:
        reports.append(message)
        happened.set()
        raise OSError("the terminal is gone")

    def read() -> State:
        if point == "reading" and failures:
            raise failures.pop(0)
        return state_of(3)

    def write(*arguments: Any) -> Path:
        if point == "writing" and failures:
            raise failures.pop(0)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "write", write)
    monkeypatch.setattr("samestep.supervisor.checkpoint_writer.WRITING_SHARE", 1e9)
    with checkpoints_of(tmp_path, report) as writer:
        for _ in range(3):
            happened.clear()
            writer.offer(Offer(read, LAYOUT, [], 3))
            assert happened.wait(30)
    failed = [each for each in reports if isinstance(each, CheckpointFailed)]
    assert [each.error for each in failed] == ["MemoryError", "full"]
    assert isinstance(reports[2], CheckpointWritten)
    assert writer.newest() == 3


def test_files_are_written_for_their_owner_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        path = write(tmp_path / "private", 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_chosen_checkpoints_are_kept_after_evenly_spaced_steps(
    train: Train, exchange: str
) -> None:
    """In the middle of an epoch, too, and without any other snapshot."""
    recipe = small_recipe(epochs=3)
    run = train(recipe, 2, keep_checkpoints=2, exchange=exchange, snapshot_seconds=0)
    kept = checkpoint.steps(checkpoint.directory_of(run.path))
    assert kept == [16, 33]
    assert run.weights_sha256 == train(recipe, 1).weights_sha256


def test_chosen_checkpoints_are_kept_where_a_resume_goes_on(
    train: Train, server: ForkServer
) -> None:
    recipe, options = small_recipe(epochs=3), {"snapshot_seconds": 0}
    run = train(recipe, 2, keep_checkpoints=2, **options)
    forget_after(run.path, 16)
    resume(run.path, server, keep_checkpoints=2, **options)
    kept = checkpoint.steps(checkpoint.directory_of(run.path))
    assert kept == [16, 33]


def test_there_are_no_more_evenly_spaced_steps_than_steps() -> None:
    assert spaced(3, 5) == {1, 2, 3}
    assert spaced(10, 4) == {2, 5, 7, 10}
    assert spaced(10, 0) == frozenset()
