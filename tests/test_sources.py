"""Sources of data: each has one fingerprint, is recorded, and says what is wrong."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train
from data_samples import (
    NUM_TRAIN,
    SOURCES,
    idx,
    idx_bytes,
    npy,
    npz,
    packed_npz,
    pictures,
    recipe_of,
)
from documents import ROOT, code_blocks
from test_exactness import results

import samestep
from samestep import Recipe
from samestep.config.sections import KINDS
from samestep.data import dataset
from samestep.data.sources import checksums, source_of
from samestep.errors import CheckpointError, DataError, RecipeError, UsageError
from samestep.files import cache
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_gives_one_result_at_any_placement(
    train: Train, tmp_path: Path, source: str
) -> None:
    recipe = recipe_of(SOURCES[source](tmp_path / "data"))
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
    losses = [epoch["train_loss"] for epoch in alone.history]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("source", SOURCES)
def test_the_splits_of_a_source_share_no_sample(tmp_path: Path, source: str) -> None:
    section = SOURCES[source](tmp_path / "data")
    data = dataset.load(recipe_of(section).data)
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert all(sizes.values())
    whole = torch.cat([s.gather(torch.arange(len(s)))[0] for s in data.splits.values()])
    assert whole.shape == (sum(sizes.values()), *data.inputs)
    assert whole.dtype == torch.float32
    if source in ("idx", "npy", "images"):
        assert len({tuple(row) for row in whole.flatten(1).tolist()}) == len(whole)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_states_names_sizes_and_checksums(tmp_path: Path, source: str) -> None:
    section = SOURCES[source](tmp_path / "data")
    described = json.loads(json.dumps(source_of(recipe_of(section).data).describe()))
    assert described["source"] == section["source"]
    found = checksums(described)
    assert found
    assert all(len(sha256) == 64 for sha256 in found.values())
    parts = (described.get("files") or described["splits"]).values()
    assert all(part["bytes"] > 0 for part in parts)


@pytest.mark.parametrize("source", ["fashion", "packed-npz", "images"])
def test_what_is_unpacked_is_unpacked_once_and_made_again_if_damaged(
    tmp_path: Path, own_cache: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(SOURCES[source](tmp_path / "data")).data
    assert source_of(recipe).prepare() is None
    files = {path: path.read_bytes() for path in own_cache.iterdir()}
    before = dataset.load(recipe).splits["train"].gather(torch.arange(9))
    next(iter(files)).write_bytes(b"x" * 99)
    assert source_of(recipe).prepare() is None
    assert {path: path.read_bytes() for path in own_cache.iterdir()} == files
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "below"))
    notice = source_of(recipe).prepare()
    assert notice
    assert cache.VARIABLE in notice
    again = dataset.load(recipe).splits["train"].gather(torch.arange(9))
    assert all(map(torch.equal, before, again))


def test_training_pixels_are_normalised_by_channel(tmp_path: Path) -> None:
    x, y = pictures(NUM_TRAIN)
    np.savez(tmp_path / "a", x_train=np.stack([x, x // 2, x * 0], axis=1), y_train=y)
    recipe = recipe_of({"source": "npz", "path": str(tmp_path / "a.npz")})
    train = dataset.load(recipe.data).splits["train"]
    inputs, _ = train.gather(torch.arange(len(train)))
    assert inputs.mean(dim=(0, 2, 3)) == pytest.approx([0, 0, 0], abs=1e-5)
    assert inputs.std(dim=(0, 2, 3)) == pytest.approx([1, 1, 0], abs=1e-3)


def test_an_array_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    """A file of 1 TB with holes: what is not used is not read."""
    rows, width = 1 << 20, 1 << 17
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        header = {"descr": "<f8", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        try:
            file.truncate(start + 8 * rows * width)
        except OSError:
            pytest.skip("the file system has no such files")
        file.seek(start + 8 * width * 3)
        file.write(np.float64(7).tobytes())
    np.save(tmp_path / "y.npy", np.arange(rows, dtype=np.int8) % 2)
    files = {"inputs": str(path), "targets": str(tmp_path / "y.npy")}
    section = {"source": "npy", **files, "test": 0.0, "validation": 0.0}
    inputs, targets = (
        dataset.load(recipe_of(section).data, None)
        .splits["train"]
        .gather(torch.tensor([3, 4]))
    )
    assert inputs[0, 0].item() == inputs.sum().item() == 7
    assert targets.tolist() == [1, 0]


def test_resume_refuses_other_data(
    train: Train, tmp_path: Path, server: ForkServer
) -> None:
    section = npy(tmp_path / "data")
    run = train(recipe_of(section, epochs=1), 1)
    assert samestep.evaluate(run, workers=2, server=server).targets == 9
    targets = np.load(section["targets"])
    np.save(section["targets"], targets + 1)
    with pytest.raises(CheckpointError, match=r"data .*-y\.npy"):
        samestep.resume(run, epochs=2, server=server, view=SilentView())


def test_a_data_set_of_dictionaries_needs_no_pass_for_its_classes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub.py").write_text(
        "import numpy as np\nfrom PIL import Image\n"
        "class Label:\n names = ['a', 'b', 'c']\n"
        "class Hub:\n"
        " features = {'image': None, 'label': Label()}\n"
        " def __len__(self): return 60\n"
        " def __getitem__(self, i):\n"
        "  pixels = np.full((4, 4), 80 * (i % 2), np.uint8)\n"
        "  return {'image': Image.fromarray(pixels), 'label': i % 2}\n"
        "def load(): return {'train': Hub(), 'test': Hub()}\n"
    )
    recipe = recipe_of({"source": "custom", "load": "hub:load"}, epochs=1)
    alone = results(train(recipe, 1))
    assert len(alone["test_confusion"]) == 3
    assert results(train(recipe, 2, exchange="gloo")) == alone


def test_the_guide_has_a_recipe_for_every_source() -> None:
    guide = code_blocks(ROOT / "docs" / "data.md")
    blocks = [content for language, content in guide if language == "toml"]
    (common,) = (tomllib.loads(b) for b in blocks if b.startswith("epochs"))
    sections = [tomllib.loads(b) for b in blocks if not b.startswith("epochs")]
    recipes = [Recipe.from_dict({"name": "x", **common, **s}) for s in sections]
    assert {recipe.data.source for recipe in recipes} == set(KINDS["data"])


Files = Callable[[Path], dict[str, Any]]


def changed_idx(name: str, content: bytes | None) -> Files:
    """One file of four has another content, or is not there."""

    def build(path: Path) -> dict[str, Any]:
        section = idx(path)
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
        return section

    return build


def changed_npz(**arrays: Any) -> Files:
    def build(path: Path) -> dict[str, Any]:
        x, y = pictures(NUM_TRAIN)
        np.savez(path, **({"x_train": x, "y_train": y} | arrays))
        return {"source": "npz", "path": f"{path}.npz"}

    return build


def with_fields(build: Files, **fields: Any) -> Files:
    return lambda path: build(path) | fields


LABELS = "train-labels-idx1-ubyte"
FEW = np.arange(NUM_TRAIN) % 3
BAD: dict[str, tuple[Files, str]] = {
    "missing-file": (changed_idx(LABELS, None), "no file train-labels-idx1-ubyte"),
    "magic": (changed_idx(LABELS, b"\0\0\r\1" + bytes(9)), "begins with 0 0 13 1"),
    "empty-file": (changed_idx(LABELS, b""), "must be an IDX file"),
    "cut": (changed_idx(LABELS, idx_bytes(np.ones(9, np.uint8))[:-1]), "damaged"),
    "too-few": (
        changed_idx(LABELS, idx_bytes(np.ones(9, np.uint8))),
        r"shapes \[9\] and \[90, 8, 8\]",
    ),
    "test-label": (
        changed_idx("t10k-labels-idx1-ubyte", idx_bytes(np.full(20, 7, np.uint8))),
        "Labels are from 0 to 2.* sample 0 of .* has 7",
    ),
    "no-fashion": (
        lambda _: {"source": "fashion-mnist", "path": "nowhere"},
        "apt-get install dataset-fashion-mnist",
    ),
    "negative": (
        changed_npz(y_train=FEW - 1),
        "sample 0 of .*, split `train` has -1",
    ),
    "empty-class": (changed_npz(y_train=2 * FEW), "has none of class 1, 3"),
    "lonely": (changed_npz(x_test=np.ones(3)), "has `x_test` without `y_test`"),
    "typo": (changed_npz(x_tset=np.ones(3)), "Did you mean `x_test`"),
    "other-shape": (
        changed_npz(x_test=np.ones((2, 8, 9)), y_test=np.ones(2, int)),
        r"`train` have \[8, 8\], those of .*`test` \[8, 9\]",
    ),
    "words": (changed_npz(y_train=np.array(["a"] * NUM_TRAIN)), "are <U1"),
    "objects": (changed_npz(y_train=np.array([None] * 90)), "holds Python objects"),
    "infinite": (changed_npz(y_train=FEW / 0.5 + np.inf), "sample 0 of .* another"),
    "matrix": (changed_npz(y_train=np.ones((90, 1), int)), r"shape \[n, 1\]"),
    "none": (
        changed_npz(x_train=np.ones((0, 3)), y_train=np.ones(0, int)),
        "has no training samples",
    ),
    "all-held-out": (
        with_fields(npz, test=0.6, validation=0.5),
        "hold out 54 and 45: none is left",
    ),
    "no-npz": (lambda _: {"source": "npz", "path": __file__}, "is not an .npz file"),
    "nowhere": (lambda _: {"source": "npz", "path": "nowhere.npz"}, "No such file"),
    "no-npy": (with_fields(npy, inputs=__file__), "is not an .npy file"),
    "not-there": (with_fields(npy, inputs="nowhere.npy"), "No such file"),
    "flat-flip": (with_fields(npy, augment={"flip": 0.5}), r"is \[1, 64\] \(torch"),
    "far": (with_fields(packed_npz, augment={"shift": 8}), r"is 8, the size \[8, 8\]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_with_data_is_said_with_its_name(
    tmp_path: Path, bad: str
) -> None:
    build, message = BAD[bad]
    section = build(tmp_path / "data")
    recipe = recipe_of(section)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        prepare_and_load(recipe)


def prepare_and_load(recipe: Recipe) -> None:
    source_of(recipe.data).prepare()
    dataset.load(recipe.data, None, recipe.seed)
    source_of(recipe.data).describe()


def test_an_error_of_a_worker_says_what_is_wrong(train: Train, tmp_path: Path) -> None:
    section = changed_npz(y_train=2 * FEW)(tmp_path / "data")
    with pytest.raises(DataError, match="none of class 1, 3"):
        train(recipe_of(section), 2)


def test_a_pair_of_test_files_is_whole(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="go together"):
        recipe_of(npy(tmp_path / "data") | {"test_inputs": "x.npy"})


def test_a_gap_in_the_classes_may_be_on_purpose(tmp_path: Path) -> None:
    section = changed_npz(y_train=2 * FEW)(tmp_path / "data") | {"outputs": 7}
    assert dataset.load(recipe_of(section).data).outputs == 7


def test_bytes_that_are_no_images_are_normalised_as_a_whole(tmp_path: Path) -> None:
    x, y = pictures(NUM_TRAIN)
    section = changed_npz(x_train=x.reshape(NUM_TRAIN, -1), y_train=y)(tmp_path / "a")
    train = dataset.load(recipe_of(section).data).splits["train"]
    inputs, _ = train.gather(torch.arange(len(train)))
    assert inputs.shape[1:] == (64,)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cnn": ({"x_train": np.ones((90, 5))}, {"family": "cnn"}, r"`cnn` takes images"),
    "vit": ({}, {"family": "vit", "patch": 9}, "8 x 8 are too small for `vit`"),
    "kernels": ({}, {"family": "cnn"}, "8 x 8 are too small for `cnn`"),
    "transformer": (
        {},
        {"family": "transformer"},
        r"takes tokens \[t\]; .*\[1, 8, 8\]",
    ),
    "rnn": ({"x_train": np.ones((90, 5))}, {"family": "rnn"}, r"width\] or tokens"),
    "integers": ({"x_train": np.ones((90, 5), int)}, {"family": "mlp"}, "torch.int64"),
    "regression": ({"y_train": np.ones(90)}, {"family": "mlp"}, "squared-error"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_model_that_does_not_fit_the_data_is_refused(
    train: Train, tmp_path: Path, misfit: str
) -> None:
    arrays, model, message = MISFITS[misfit]
    section = changed_npz(**({"y_train": FEW} | arrays))(tmp_path / "data")
    with pytest.raises(UsageError, match=message):
        train(recipe_of(section).changed({"model": model}))


def test_the_supervisor_imports_neither_torch_nor_what_reads_files(
    tmp_path: Path,
) -> None:
    """From the import to the end of a training: workers import what they need."""
    code = (
        "import sys, samestep\n"
        "fields = {'epochs': 1, 'data__train_samples': 1000, 'workers': 1}\n"
        "samestep.train('mnist-mlp', out='run', **fields)\n"
        "print(*sys.modules, sep='\\n')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = set(ended.stdout.splitlines())
    assert "samestep.supervisor.session" in modules
    assert not {"torch", "PIL", "pyarrow"} & modules
