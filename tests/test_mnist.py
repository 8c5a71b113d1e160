import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samestep import DataError
from samestep.config.data import MnistData
from samestep.data.sources import mnist


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory that does not exist yet."""
    path = tmp_path / "cache"
    monkeypatch.setenv("SAMESTEP_CACHE", str(path))
    return path


def test_the_splits_are_the_genuine_images(cache: Path) -> None:
    splits = mnist.load(MnistData())
    assert [len(splits[name].labels) for name in ("train", "validation", "test")] == [
        55_000,
        5_000,
        10_000,
    ]
    assert splits["train"].labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert splits["test"].labels[:5].tolist() == [7, 2, 1, 0, 4]
    images = np.concatenate([splits["train"].images, splits["validation"].images])
    assert images.mean() / 255 == pytest.approx(mnist.MEAN, abs=1e-4)
    assert images.std() / 255 == pytest.approx(mnist.STD, abs=1e-4)


def test_all_images_are_trained_on_without_validation(cache: Path) -> None:
    splits = mnist.load(MnistData(validation=0))
    assert len(splits["train"].labels) == 60_000
    assert len(splits["validation"].labels) == 0


def test_a_damaged_cache_is_rebuilt(cache: Path) -> None:
    assert mnist.prepare() is None
    files = {path: path.read_bytes() for path in cache.iterdir()}
    for damage, (path, content) in enumerate(files.items()):
        path.write_bytes([b"", content[:-1], content[:99] + b"\xff" * 9, b"x"][damage])
    assert mnist.prepare() is None
    assert {path: path.read_bytes() for path in cache.iterdir()} == files


def test_without_a_writable_cache_the_data_are_the_same(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = mnist.load(MnistData())["train"].images
    (cache.parent / "file").touch()
    monkeypatch.setenv("SAMESTEP_CACHE", str(cache.parent / "file" / "below"))
    notice = mnist.prepare()
    assert notice is not None
    assert "SAMESTEP_CACHE" in notice
    assert np.array_equal(mnist.load(MnistData())["train"].images, cached)


def test_processes_that_start_at_once_fill_the_cache_together(cache: Path) -> None:
    code = "from samestep.data import mnist; assert mnist.prepare() is None"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    names = {path.name for path in cache.iterdir()}
    assert names == {f"{f.name}-{f.sha256[:16]}" for f in mnist.FILES.values()}
    for file in mnist.FILES.values():
        content = (cache / f"{file.name}-{file.sha256[:16]}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == file.sha256


@pytest.mark.parametrize("damage", ["missing", "truncated", "other content"])
def test_a_damaged_package_is_named_with_its_checksum(
    cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    package = cache.parent / "package"
    (package / "files").mkdir(parents=True)
    genuine = Path(mnist.__file__).parent / "files"
    for path in genuine.glob("*.gz"):
        (package / "files" / path.name).symlink_to(path)
    victim = package / "files" / "t10k-labels-idx1-ubyte.gz"
    labels, images = victim.read_bytes(), (genuine / "t10k-images-idx3-ubyte.gz")
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(labels[: len(labels) // 2])
    if damage == "other content":
        victim.symlink_to(images)
    monkeypatch.setattr(
        "samestep.data.sources.mnist.resources.files", lambda _: package
    )
    with pytest.raises(DataError) as caught:
        mnist.prepare()
    assert str(victim) in str(caught.value)
    assert mnist.FILES["t10k-labels-idx1-ubyte"].sha256 in str(caught.value)


def test_more_samples_than_there_are_is_an_error(cache: Path) -> None:
    with pytest.raises(DataError, match="Use at most 55,000"):
        mnist.load(MnistData(train_samples=55_001))
