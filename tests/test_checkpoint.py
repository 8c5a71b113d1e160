"""Checkpoints on disk: a damaged one is never used and never a traceback."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samestep.config.recipe import Recipe
from samestep.core.progress import Progress
from samestep.errors import CheckpointError
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.layout import Entry, Layout
from samestep.state.snapshot import State


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
