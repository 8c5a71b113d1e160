"""Checkpoints on disk: a damaged one is never used and never a traceback."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import Train, small_recipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import forget_after, resume

from samestep.config.recipe import Recipe
from samestep.core.ownership import spaced
from samestep.core.progress import Progress
from samestep.errors import CheckpointError
from samestep.messages.training import CheckpointFailed, CheckpointWritten
from samestep.output.fence import Fence
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.layout import Entry, Layout
from samestep.state.snapshot import State
from samestep.supervisor.checkpoint_writer import CheckpointWriter, Offer
from samestep.supervisor.forkserver_client import ForkServer


LAYOUT = Layout(
    parameters=(Entry(name="w", shape=(3, 5)), Entry(name="b", shape=(7,))),
    buffers=(Entry(name="mean", shape=(2,)),),
    counters=("seen",),
    states=("exp_avg",),
)
BUILD = {"torch": "2.13.0", "instruction_set": "AVX2"}
RECIPE = Recipe.load("mnist-mlp")
FILES = (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.MANIFEST)


def state_of(step: int, layout: Layout = LAYOUT) -> State:
    """Numbers that differ between steps, but for the padding, which no file has."""
    vector = np.zeros(layout.size, layout.dtype)
    states = np.zeros((len(layout.states), layout.size), layout.dtype)
    for number, row in enumerate((vector, *states)):
        for _, view in layout.parameter_views(row):
            view[...] = np.random.default_rng(step + number).standard_normal(view.shape)
    sums = {"loss": 0.1 + step, "metrics": [3.0], "targets": 5}
    progress = {
        "step": step,
        "epochs": 0,
        "epoch": sums,
        "logged": sums,
        "noise": {"signal": 0.25, "variance": 3.0},
        "seconds": 0.3,
        "phases": [0.1, 0.2],
        "counts": [step] * len(layout.counters),
        "stopping": {"best": None, "best_epoch": 0, "waited": 0, "counts": [7]},
    }
    progress = Progress.model_validate(progress).model_dump()
    tail = np.arange(layout.kept_tail, dtype=layout.dtype) + step / 3
    return State(progress, vector, states, tail.astype(layout.dtype))


def write(
    directory: Path, step: int, epochs: list[dict[str, Any]] | None = None
) -> Path:
    return checkpoint.write(
        directory, state_of(step), LAYOUT, RECIPE, BUILD, epochs or []
    )


def same(one: State, other: State) -> bool:
    return one.progress == other.progress and all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("parameters", "states", "tail")
    )


def newest(directory: Path) -> tuple[int | None, list[str]]:
    """Return the step of the checkpoint that `resume` would use, and the notices."""
    skipped: list[str] = []
    for step, found in checkpoint.newest_valid(directory):
        if isinstance(found, Checkpoint):
            assert same(found.state, state_of(step))
            return step, skipped
        skipped.append(found)
    return None, skipped


def test_a_checkpoint_is_read_back_whole(tmp_path: Path) -> None:
    found = checkpoint.load(write(tmp_path, 12, [{"epoch": 1, "seconds": 0.1}]))
    assert same(found.state, state_of(12))
    assert found.manifest.build == BUILD
    assert found.manifest.layout == LAYOUT
    assert Recipe.from_dict(found.manifest.recipe) == RECIPE
    assert not list(tmp_path.glob(".*"))


def test_its_tensors_have_the_names_of_the_model(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    model = safetensors.numpy.load_file(path / checkpoint.MODEL)
    assert {name: tensor.shape for name, tensor in model.items()} == {
        "w": (3, 5),
        "b": (7,),
        "mean": (2,),
        "seen": (),
    }
    optimizer = safetensors.numpy.load_file(path / checkpoint.OPTIMIZER)
    assert set(optimizer) == {"exp_avg/w", "exp_avg/b"}


@settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_damage_to_any_file_is_noticed_or_harmless(
    tmp_path: Path, data: st.DataObject
) -> None:
    shutil.rmtree(tmp_path / "c", ignore_errors=True)
    write(tmp_path / "c", 1)
    path = write(tmp_path / "c", 2)
    file = path / data.draw(st.sampled_from(FILES))
    content = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    how = data.draw(st.sampled_from(["flip", "truncate", "swap", "empty", "delete"]))
    if how == "flip":
        content[where] ^= data.draw(st.integers(1, 255))
    elif how == "truncate":
        del content[where:]
    elif how == "swap":
        other = data.draw(st.integers(0, len(content) - 1))
        content[where], content[other] = content[other], content[where]
    elif how == "empty":
        content[:] = bytes(len(content))
    file.write_bytes(content)
    if how == "delete":
        file.unlink()
    step, skipped = newest(tmp_path / "c")
    if step == 1:
        assert len(skipped) == 1
        assert "step-2" in skipped[0]
    else:  # for example two equal bytes swapped, or white space in the manifest
        assert step == 2


def rewritten(path: Path, change: dict[str, Any]) -> None:
    """Rewrite a manifest with the right digest: an attacker can compute it too."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text()) | change
    del manifest["digest"]
    manifest["digest"] = checkpoint.digest_of(manifest)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def vouched(path: Path, name: str, content: bytes) -> None:
    """Rewrite a manifest with the right sizes and sums, as an attacker could."""
    (path / name).write_bytes(content)
    files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
    digest = hashlib.sha256(content).hexdigest()
    files[name] = {"bytes": len(content), "sha256": digest}
    rewritten(path, {"files": files})


def test_a_manifest_cannot_name_other_files(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    entry = {"bytes": 1, "sha256": "0" * 64}
    for name in ("../../etc/passwd", "/etc/passwd", "more.safetensors"):
        rewritten(path, {"files": {name: entry}})
        with pytest.raises(CheckpointError, match="is not valid"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"surprise": 1},
        {"epoch": -1},
        {"recipe": {}},
        {"recipe_digest": "0" * 64},
        {"files": {}},
        {"layout": {"parameters": [{"name": "w", "shape": [2**50]}]}},
        {"layout": {"parameters": [{"name": "w", "shape": [-1]}]}},
    ],
    ids=str,
)
def test_a_manifest_with_other_fields_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    path = write(tmp_path, 1)
    rewritten(path, change)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("huge header", (2**62).to_bytes(8, "little") + b"{}"),
        ("no header", b"\x00" * 4),
        ("pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."),
        ("other names", safetensors.numpy.save({"x": np.zeros(3, np.float32)})),
        (
            "other dtype",
            safetensors.numpy.save(
                {
                    "w": np.zeros((3, 5), np.float64),
                    "b": np.zeros(7, np.float32),
                    "mean": np.zeros(2, np.float32),
                    "seen": np.array(1, np.int64),
                }
            ),
        ),
        (
            "other shape",
            safetensors.numpy.save(
                {
                    "w": np.zeros((5, 3), np.float32),
                    "b": np.zeros(7, np.float32),
                    "mean": np.zeros(2, np.float32),
                    "seen": np.array(1, np.int64),
                }
            ),
        ),
        (
            "counter of floats",
            safetensors.numpy.save(
                {
                    "w": np.zeros((3, 5), np.float32),
                    "b": np.zeros(7, np.float32),
                    "mean": np.zeros(2, np.float32),
                    "seen": np.array(1, np.float32),
                }
            ),
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_even_with_right_sums(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = write(tmp_path, 1)
    vouched(path, checkpoint.MODEL, content)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "null", "{", "\0", ""])
def test_a_manifest_that_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, 1)
    (path / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


def test_symbolic_links_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / checkpoint.MODEL).rename(tmp_path / "elsewhere")
    (path / checkpoint.MODEL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        checkpoint.load(path)


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
