"""Folders of images by class: decoding, order, and what cannot be read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train
from data_samples import SIDE, images, recipe_of
from PIL import Image

from samestep.config.data import ImageData
from samestep.data import dataset
from samestep.data.sources import checksums, source_of
from samestep.data.sources import image_folder as source
from samestep.errors import DataError, RecipeError
from samestep.files import cache


DEADLINE = 120.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 images of three classes."""
    images(tmp_path / "data")
    return tmp_path / "data"


def section(folder: Path, **fields: Any) -> ImageData:
    return ImageData(path=str(folder), size=SIDE, **fields)


def test_images_come_in_the_order_of_their_paths(folder: Path) -> None:
    pair = source.ImageSource(section(folder, channels=1)).arrays()["train"]
    assert pair.inputs.shape == (60, 1, SIDE, SIDE)
    assert pair.targets.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    (folder / "row-0" / "a").mkdir()
    (folder / "row-0" / "000.png").rename(folder / "row-0" / "a" / "z.png")
    (folder / "row-0" / ".hidden").touch()
    moved = source.ImageSource(section(folder, channels=1)).arrays()["train"]
    assert np.array_equal(moved.inputs[19], pair.inputs[0])
    assert np.array_equal(moved.inputs[:19], pair.inputs[1:20])


def test_an_image_is_turned_upright_scaled_and_cut(tmp_path: Path) -> None:
    """40 x 20, red on the left, which is up by its EXIF orientation."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        image = Image.fromarray(pixels)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "data" / name / "x.png", exif=exif)
    found = source.ImageSource(ImageData(path=str(tmp_path / "data"), size=10)).arrays()
    red, green, _ = found["train"].inputs[0]
    assert (red[:4] == 255).all()
    assert (red[6:] == 0).all()
    assert (green == 0).all()


def test_a_change_in_the_folder_is_noticed(folder: Path, own_cache: Path) -> None:
    recipe = section(folder)
    before = source_of(recipe).describe()
    file = folder / "row-1" / "001.png"
    Image.new("RGB", (9, 9)).save(file)
    os.utime(file, (1, 1))
    after = source_of(recipe).describe()
    assert checksums(before) != checksums(after)


def spoil(folder: Path) -> None:
    """Replace images by a text, an empty file, and one cut in the middle."""
    (folder / "row-1" / "004.png").write_text("no image")
    (folder / "row-2" / "002.png").write_bytes(b"")
    cut = folder / "row-0" / "000.png"
    cut.write_bytes(cut.read_bytes()[:60])


def test_images_that_cannot_be_read_are_named_and_counted(
    folder: Path, train: Train
) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=r"3 of 60 .*row-0/000.png .*--skip-bad"):
        train(recipe_of({"source": "images", "path": str(folder)}))


def test_skip_bad_goes_on_and_counts(
    folder: Path, tmp_path: Path, train: Train
) -> None:
    spoil(folder)
    recipe = recipe_of({"source": "images", "path": str(folder), "size": SIDE})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml())
    command = [sys.executable, "-m", "samestep", "train", str(path), "--skip-bad"]
    ended = subprocess.run(
        [*command, "--workers=2", "--no-report", f"--out={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "3 of 60 images" in ended.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["skipped"] == 3
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    train_folder = environment["data"]["splits"]["train"]
    assert train_folder["images"] == 57
    assert [name for name, _ in train_folder["skipped"]] == [
        *("row-0/000.png", "row-1/004.png", "row-2/002.png"),
    ]
    for name, _ in train_folder["skipped"]:
        (folder / name).unlink()
    assert result["weights_sha256"] == train(recipe).weights_sha256


def test_skip_bad_is_for_images() -> None:
    with pytest.raises(RecipeError, match=r"no field `data\.skip_bad`"):
        recipe_of({"source": "npz", "path": "x.npz", "skip_bad": True})


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "row-9").mkdir()
    with pytest.raises(DataError, match="row-9 has none"):
        source_of(section(folder)).prepare()
    (folder / "row-9" / "x.png").write_text("no image")
    with pytest.raises(DataError, match=r"none in .*row-9 can be read"):
        source_of(section(folder, skip_bad=True)).prepare()


def test_a_folder_needs_classes_and_to_be_there(folder: Path) -> None:
    with pytest.raises(DataError, match=r"at least 2; .* has 0"):
        source_of(section(folder / "row-1")).prepare()
    with pytest.raises(DataError, match="is not a folder"):
        source_of(section(folder / "nowhere")).prepare()
    other = folder.with_name("other")
    images(other)
    (other / "row-0").rename(other / "row-8")
    with pytest.raises(DataError, match="do not agree on row-0"):
        source_of(section(folder, test_path=str(other))).prepare()


def test_a_folder_of_its_own_is_the_test(folder: Path, tmp_path: Path) -> None:
    images(tmp_path / "test", 12)
    data = dataset.load(section(folder, test_path=str(tmp_path / "test")))
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert sizes == {"train": 54, "validation": 6, "test": 12}
    _, targets = data.splits["test"].gather(torch.arange(12))
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_without_pillow_the_command_to_install_it_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install 'samestep\[data\]'"):
        source_of(section(folder)).prepare()
