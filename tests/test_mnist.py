import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from samestep import DataError
from samestep.config.data import MnistData
from samestep.data import dataset
from samestep.data.sources import mnist
from samestep.data.sources.mnist import CONTENT, FOLDER, MnistSource


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory that does not exist yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("SAMESTEP_CACHE", str(path))
    return path


DIGEST_BYTES = 32


def test_the_splits_are_the_genuine_images(cache: Path) -> None:
    splits = MnistSource(MnistData()).arrays()
    assert [len(splits[name].targets) for name in ("train", "validation", "test")] == [
        55_000,
        5_000,
        10_000,
    ]
    assert splits["train"].targets[:5].tolist() == [5, 0, 4, 1, 9]
    assert splits["test"].targets[:5].tolist() == [7, 2, 1, 0, 4]
    images = np.concatenate([splits["train"].inputs, splits["validation"].inputs])
    assert images.mean() / 255 == pytest.approx(mnist.MEAN, abs=1e-4)
    assert images.std() / 255 == pytest.approx(mnist.STD, abs=1e-4)


def test_images_are_normalised_by_mean_and_deviation(cache: Path) -> None:
    inputs, targets = dataset.load(MnistData()).splits["test"].gather(torch.arange(2))
    raw = MnistSource(MnistData()).arrays()["test"].inputs[:2]
    expected = torch.from_numpy(raw.copy()).float().mul_(1 / (255 * mnist.STD))
    assert torch.equal(inputs, expected.sub_(mnist.MEAN / mnist.STD).unsqueeze(1))
    assert targets.tolist() == [7, 2]
    assert targets.dtype == torch.int64


def test_all_images_are_trained_on_without_validation(cache: Path) -> None:
    splits = MnistSource(MnistData(validation=0)).arrays()
    assert len(splits["train"].targets) == 60_000
    assert len(splits["validation"].targets) == 0


def test_a_damaged_cache_is_rebuilt(cache: Path) -> None:
    source = MnistSource(MnistData())
    assert source.prepare() is None
    files = {path: path.read_bytes() for path in cache.iterdir()}
    for damage, (path, content) in enumerate(files.items()):
        path.write_bytes([b"", content[:-1], content[:99] + b"\xff" * 9, b"x"][damage])
    assert source.prepare() is None
    assert {path: path.read_bytes() for path in cache.iterdir()} == files


def test_without_a_writable_cache_the_data_are_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = MnistSource(MnistData())
    cached = source.arrays()["train"].inputs
    (cache.parent / "file").touch()
    monkeypatch.setenv("SAMESTEP_CACHE", str(cache.parent / "file" / "below"))
    notice = source.prepare()
    assert notice is not None
    assert "SAMESTEP_CACHE" in notice
    assert np.array_equal(source.arrays()["train"].inputs, cached)


def test_processes_that_start_at_once_fill_the_cache_together(cache: Path) -> None:
    code = "from samestep.data.sources import idx, mnist; idx.prepare(mnist.files())"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    contents = [path.read_bytes()[:-DIGEST_BYTES] for path in cache.iterdir()]
    found = {(len(c), hashlib.sha256(c).hexdigest()) for c in contents}
    assert found == set(CONTENT.values())


@pytest.mark.parametrize("damage", ["missing", "truncated", "other content"])
def test_a_damaged_package_is_named_with_a_remedy(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    package = cache.parent / "package"
    package.mkdir()
    for path in FOLDER.glob("*.gz"):
        (package / path.name).symlink_to(path)
    victim = package / "t10k-labels-idx1-ubyte.gz"
    labels, images = victim.read_bytes(), FOLDER / "t10k-images-idx3-ubyte.gz"
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(labels[: len(labels) // 2])
    if damage == "other content":
        victim.symlink_to(images)
        expected = CONTENT["t10k-labels-idx1-ubyte"][1]
    else:
        expected = "cannot be read" if damage == "missing" else "is damaged"
    monkeypatch.setattr(mnist, "FOLDER", package)
    with pytest.raises(DataError, match=r"Install samestep again\.$") as caught:
        MnistSource(MnistData()).prepare()
    assert str(victim) in str(caught.value)
    assert expected in str(caught.value)


def test_more_samples_than_there_are_is_an_error(cache: Path) -> None:
    with pytest.raises(DataError, match="Use at most 55,000"):
        MnistSource(MnistData(train_samples=55_001)).arrays()
