"""MNIST from the package, unpacked once per machine and mapped by every worker.

The cache holds the unpacked files under their checksums. Each process verifies what it
maps (25 ms for the 47 MB of training images), so that a damaged cache is rebuilt and
never trained on. The pages of a map are in memory once, however many workers read them.
Without a writable cache directory, every process unpacks its own copy (0.3 s).
"""

import gzip
import hashlib
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from samestep.config.data import MnistData
from samestep.errors import DataError
from samestep.system import atomic_files, cache


NUM_TRAIN = 60_000
NUM_CLASSES = 10
NUM_PIXELS = 784
# Mean and standard deviation of the training images' pixels, scaled to 0..1.
MEAN, STD = 0.1307, 0.3081


@dataclass(frozen=True)
class IdxFile:
    """One file of the data set; the checksum is of the unpacked content."""

    name: str
    sha256: str
    header_bytes: int
    shape: tuple[int, ...]


FILES = {
    file.name: file
    for file in (
        IdxFile(
            "train-images-idx3-ubyte",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            16,
            (NUM_TRAIN, NUM_PIXELS),
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            8,
            (NUM_TRAIN,),
        ),
        IdxFile(
            "t10k-images-idx3-ubyte",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            16,
            (10_000, NUM_PIXELS),
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            8,
            (10_000,),
        ),
    )
}


@dataclass(frozen=True)
class Samples:
    """Images uint8 [n, 784] and labels uint8 [n] of one split."""

    images: cache.Bytes
    labels: cache.Bytes


def load(recipe: MnistData) -> dict[str, Samples]:
    """The splits `train`, `validation` (may be empty) and `test`.

    Raises DataError where a file of the package is missing or damaged, or where the
    recipe asks for more samples than there are.
    """
    kept = NUM_TRAIN - recipe.validation
    wanted = kept if recipe.train_samples is None else recipe.train_samples
    if wanted > kept:
        raise DataError(
            f"MNIST has {NUM_TRAIN:,} training images, of which `data.validation` "
            f"holds out {recipe.validation:,}; received "
            f"`data.train_samples` = {wanted:,}. "
            f"Use at most {kept:,}."
        )
    images, labels = (
        _array("train-images-idx3-ubyte"),
        _array("train-labels-idx1-ubyte"),
    )
    return {
        "train": Samples(images[:wanted], labels[:wanted]),
        "validation": Samples(images[kept:], labels[kept:]),
        "test": Samples(
            _array("t10k-images-idx3-ubyte"), _array("t10k-labels-idx1-ubyte")
        ),
    }


def describe() -> dict[str, Any]:
    """Name, size and checksums, for the run's record."""
    return {
        "source": "mnist",
        "files": {
            file.name: {
                "bytes": file.header_bytes + int(np.prod(file.shape)),
                "sha256": file.sha256,
            }
            for file in FILES.values()
        },
    }


def prepare() -> str | None:
    """Fill the cache. Says so if it cannot be written. Raises DataError."""
    try:
        for file in FILES.values():
            _cached(file)
    except cache.UNWRITABLE as error:
        return cache.notice(error)
    return None


def _array(name: str) -> cache.Bytes:
    file = FILES[name]
    try:
        raw = _cached(file)
    except cache.UNWRITABLE:
        raw = np.frombuffer(bytearray(_unpack(file)), np.uint8)
    return raw[file.header_bytes :].reshape(file.shape)


def _cached(file: IdxFile) -> cache.Bytes:
    """The whole verified file, mapped; unpacked first where that is necessary."""
    path = cache.directory() / f"{file.name}-{file.sha256[:16]}"
    if not _is_intact(path, file):
        # Atomic: another run may be filling or mapping the same file.
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, _unpack(file))
    # Copy-on-write rather than read-only: PyTorch warns about read-only arrays. No
    # process writes, so no page is ever copied.
    return np.memmap(path, np.uint8, "c")


def _is_intact(path: Path, file: IdxFile) -> bool:
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == file.sha256
    except FileNotFoundError:
        return False


def _unpack(file: IdxFile) -> bytes:
    packed = resources.files("samestep.data") / "files" / f"{file.name}.gz"
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"The data file {packed} cannot be read ({error}); its content must have "
            f"SHA-256 {file.sha256}. Install samestep again."
        ) from None
    received = hashlib.sha256(content).hexdigest()
    if received != file.sha256:
        raise DataError(
            f"The data file {packed} is damaged: its content must have SHA-256 "
            f"{file.sha256}, it has {received}. Install samestep again."
        )
    return content
