"""Damaged and malicious files: one sentence, no traceback, no wait, no escapes."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Train, small_recipe
from fuzz_readers import held_in_memory
from report_samples import write_run

import samestep
from samestep import Recipe, Run
from samestep.config.training import InitRecipe
from samestep.data.sources import source_of
from samestep.data.sources.idx import IdxFile
from samestep.elastic import node_state
from samestep.errors import SamestepError
from samestep.output.fence import Fence
from samestep.output.run import Settings, first_difference, read_recipe
from samestep.output.run_writer import RunWriter
from samestep.state import pretrained
from samestep.system import terminal


SOURCES = sorted(Path(samestep.__file__).parent.rglob("*.py"))
SHA256, DEEP = "0" * 64, "[" * 100_000
ESCAPES = "\x1b[2J\x1b]0;title\x07\u202e\r\x9b31m"


def model_file(path: Path, recipe: str, **tensors: torch.Tensor) -> Path:
    safetensors.torch.save_file(tensors, path, {"recipe": recipe})
    return path


@pytest.mark.parametrize(
    "recipe", ["not JSON", "[]", "7", DEEP, '{"a": ' * 90 + "1" + "}" * 90]
)
def test_a_model_file_whose_recipe_is_none_is_refused(
    tmp_path: Path, recipe: str
) -> None:
    with pytest.raises(SamestepError, match=r"recipe|nested"):
        read_recipe(model_file(tmp_path / "m", recipe, w=torch.zeros(1)))


def test_weights_that_are_not_those_of_the_recipe_are_named(
    train: Train, tmp_path: Path
) -> None:
    run = train(small_recipe(), 1)
    state = safetensors.torch.load_file(run.model_file)
    state["layers.0.bias"] = state["layers.0.bias"][:5].clone()
    state["stranger"] = state.pop("layers.1.bias")
    recipe = json.dumps(run.recipe.to_dict())
    safetensors.torch.save_file(state, run.model_file, {"recipe": recipe})
    with pytest.raises(samestep.RunError) as raised:
        run.load_model()
    for part in (
        "missing: layers.1.bias",
        "unknown to the model: stranger",
        r"layers.0.bias [5] instead of [37]",
    ):
        assert part in str(raised.value)


def with_result(run: Path, text: str) -> Path:
    (run / "result.json").write_text(text)
    return run


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        DEEP,
        "{}",
        '{"recipe": {}, "status": 7}',
        '{"recipe": {}, "status": "failed", "train_seconds": "x"}',
        '{"recipe": {}, "status": "finished", "epochs": [{}]}',
        '{"recipe": {}, "status": "finished", "epochs": [7]}',
        '{"recipe": {}, "status": "x", "epochs": [{"epoch": 1, "weights_sha256": 1}]}',
        '{"recipe": {}, "status": "finished", "weights_sha256": null, "epochs": {}}',
        '{"recipe": {}, "status": "finished", "n": ' + "9" * 10_000 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_a_result_that_is_none_is_refused_with_a_sentence(
    tmp_path: Path, text: str
) -> None:
    run = with_result(write_run(tmp_path / "run"), text)
    with pytest.raises(samestep.RunError, match=r"result\.json"):
        Run.open(run)


def test_a_failed_run_without_epochs_has_an_empty_history(tmp_path: Path) -> None:
    run = with_result(write_run(tmp_path / "run"), '{"recipe": {}, "status": "failed"}')
    assert Run.open(run).history == []
    assert "failed" in Run.open(run)._repr_html_()


def test_runs_without_final_weights_are_not_compared(tmp_path: Path) -> None:
    epochs = [{"epoch": 1, "weights_sha256": SHA256}]
    text = json.dumps({"recipe": {}, "status": "failed", "epochs": epochs})
    run = Run.open(with_result(write_run(tmp_path / "run"), text))
    with pytest.raises(samestep.RunError, match="has no final weights"):
        first_difference(run, run)


@pytest.mark.parametrize("line", [DEEP, "7", "null", '{"type": "step", "step": "x"}'])
def test_a_record_that_is_none_is_dropped_by_resume(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path / "run", ended=False)
    (run / "generation").write_text(line)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    settings = Settings.of(small_recipe(), samestep.Placement(workers=1))
    with RunWriter.reopen(run, settings, 0.0) as writer:
        writer.rewind(10, [])
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10]


@pytest.mark.parametrize("number", ["-1", "1e999", "9" * 4_000, "true", '"3"'])
def test_an_impossible_generation_counts_as_none(tmp_path: Path, number: str) -> None:
    (tmp_path / "generation").write_text(f'{{"number": {number}}}')
    assert Fence.claim(tmp_path).number in (1, 2)


@pytest.mark.parametrize(
    "text", [f"x = {DEEP}", "epochs = " + "9" * 10_000, "x = " + "[" * 200 + "]" * 200]
)
def test_a_recipe_of_long_numbers_or_depths_is_refused(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(samestep.RecipeError):
        Recipe.load(tmp_path / "r.toml")


@pytest.mark.parametrize("section", ["data", "model", "loss", "optimizer", "init"])
def test_a_section_of_a_recipe_that_is_no_table_is_refused(section: str) -> None:
    fields = small_recipe().to_dict() | {section: "x"}
    with pytest.raises(samestep.RecipeError, match=f"`{section}`"):
        Recipe.from_dict(fields)


@pytest.mark.parametrize(
    ("said", "instead"),
    [
        ('"workers":1', '"workers":4294967296'),
        ('"workers":1', '"workers":60000'),
        ('"shape":[3,5]', '"shape":[3,50000000]'),
    ],
)
def test_a_state_in_memory_that_claims_impossible_sizes_is_left_alone(
    tmp_path: Path, said: str, instead: str
) -> None:
    held_in_memory(tmp_path)
    (about,) = tmp_path.rglob("about.json")
    (memory,) = tmp_path.rglob("memory")
    size = memory.stat().st_size
    assert said in about.read_text()
    about.write_text(about.read_text().replace(said, instead))
    assert node_state.newest(tmp_path / "run") is None
    assert memory.stat().st_size == size


def a_directory(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def described(recipe: Recipe) -> object:
    """Describe data as the supervisor does."""
    return source_of(recipe.data).prepare(), source_of(recipe.data).describe()


DATA: dict[str, Callable[[Path], dict[str, Any]]] = {
    "npy": lambda p: {"source": "npy", "inputs": str(p), "targets": str(p)},
    "npz": lambda p: {"source": "npz", "path": str(p)},
    "csv": lambda p: {"source": "table", "path": str(p), "target": "y"},
    "text": lambda p: {"source": "text", "path": str(p), "context": 8},
}


@pytest.mark.parametrize("source", DATA)
@pytest.mark.parametrize("make", [os.mkfifo, a_directory, a_device])
def test_data_are_files_and_nothing_is_waited_for(
    tmp_path: Path, source: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / f"data.{source}")
    recipe = small_recipe().changed({"data": DATA[source](tmp_path / f"data.{source}")})
    with pytest.raises(samestep.DataError, match=r"it is a|No file in"):
        described(recipe)


@pytest.mark.parametrize("make", [os.mkfifo, a_device])
def test_models_recipes_and_weights_are_files(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "it"
    make(path)
    for read in (
        lambda: read_recipe(path),
        lambda: Recipe.load(path),
        lambda: pretrained.read(InitRecipe(weights=str(path))),
    ):
        with pytest.raises(SamestepError, match=r"it is a (named pipe|device), not a"):
            read()


def test_an_array_that_claims_more_than_the_disk_holds_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "a.npz", x_train=np.zeros((9, 9)), y_train=[1] * 9)
    usage = SimpleNamespace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setenv("SAMESTEP_CACHE", str(tmp_path / "cache"))
    recipe = small_recipe().changed({"data": DATA["npz"](tmp_path / "a.npz")})
    with pytest.raises(samestep.DataError, match="room for 1 bytes; these have"):
        source_of(recipe.data).prepare()
    assert not list((tmp_path / "cache").iterdir())


def test_an_array_whose_shape_is_not_of_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((1, 4)))
    path.write_bytes(path.read_bytes().replace(b"(1, 4)", b"(True, 4)", 1))
    content = path.read_bytes()
    length = (int.from_bytes(content[8:10], "little") + 3).to_bytes(2, "little")
    path.write_bytes(content[:8] + length + content[10:])
    recipe = small_recipe().changed({"data": DATA["npy"](path)})
    with pytest.raises(samestep.DataError, match=r"its shape is \(True, 4\)"):
        source_of(recipe.data).arrays()  # type: ignore[attr-defined]


def test_a_table_whose_names_are_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"x\xff,y\n1,2\n")
    recipe = small_recipe().changed({"data": DATA["csv"](path)})
    with pytest.raises(samestep.DataError, match="is not a table"):
        described(recipe)


def test_an_archive_that_leads_behind_its_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every worker unpacks for itself, since no cache can be written."""
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x_train=np.zeros((9, 9)), y_train=[1] * 9)
    content = bytearray(path.read_bytes())
    offset = content.index(b"PK\x01\x02") + 42  # in the directory of the archive
    content[offset : offset + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(content)
    monkeypatch.setenv("SAMESTEP_CACHE", "/proc/nowhere")
    recipe = small_recipe().changed({"data": DATA["npz"](path)})
    with pytest.raises(samestep.DataError, match=r"is damaged|is not an"):
        source_of(recipe.data).arrays()  # type: ignore[attr-defined]


def test_a_packed_file_that_is_longer_than_its_header_says_is_not_unpacked(
    tmp_path: Path,
) -> None:
    header = bytes((0, 0, 8, 1)) + (3).to_bytes(4, "big")
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(header + bytes(10 << 20)))
    with pytest.raises(samestep.DataError, match="is damaged: its header says"):
        IdxFile(path).array(1)


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "samestep", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=100,
    )


def test_names_in_a_file_cannot_control_the_terminal(tmp_path: Path) -> None:
    fields = json.dumps({**small_recipe().to_dict(), ESCAPES: 1})
    model_file(tmp_path / "m", fields, w=torch.zeros(1))
    ended = command("evaluate", "m", cwd=tmp_path)
    assert ended.returncode == 2
    assert "there is no field `\\x1b[2J\\x1b]0;title\\x07\\u202e\\r" in ended.stderr
    assert terminal.clean(ended.stderr) == ended.stderr


def test_names_of_other_languages_stay_readable() -> None:
    for text in ("größe", "模型", "נתונים", "\N{SNOWMAN} a\tb\n"):
        assert terminal.clean(text) == text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_everything_that_is_printed_goes_through_one_place(path: Path) -> None:
    text = path.read_text()
    assert path.name == "terminal.py" or "click.echo(" not in text
    assert "print(text" not in text
