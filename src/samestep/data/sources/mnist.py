"""MNIST: four IDX files of the package, whose content is known.

The supervisor unpacks them into the cache, once per machine, and checks them; every
worker maps what is there, so they are in memory once, however many workers read them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samestep.config.data import MnistData
from samestep.data.sources import idx
from samestep.data.sources.idx import IdxFile
from samestep.data.sources.source import Pair, Source
from samestep.errors import DataError
from samestep.system.json_values import JsonObject


FOLDER = Path(__file__).parents[1] / "files"
CONTENT = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
"""Size and SHA-256 of each unpacked file."""
NUM_TRAIN = 60_000
NUM_CLASSES = 10
SHAPE = (1, 28, 28)
# Mean and standard deviation of the training images' pixels, scaled to 0..1.
MEAN, STD = 0.1307, 0.3081


@dataclass(frozen=True)
class MnistSource(Source):
    recipe: MnistData

    def prepare(self) -> str | None:
        """Unpack the files into the cache. Returns a notice. Raises DataError."""
        return idx.prepare(files())

    def describe(self) -> JsonObject:
        """Return name, size and SHA-256 of each file."""
        described = {n: {"bytes": b, "sha256": s} for n, (b, s) in CONTENT.items()}
        return {"source": "mnist", "files": described}

    def arrays(self) -> Mapping[str, Pair]:
        """Return images uint8 [n, 28, 28] and labels uint8 [n] of all three splits.

        Raises DataError where a file of the package is missing or damaged, or where the
        recipe asks for more samples than there are.
        """
        kept = NUM_TRAIN - self.recipe.validation
        wanted = self.recipe.train_samples or kept
        if wanted > kept:
            raise DataError(
                f"MNIST has {NUM_TRAIN:,} training images, of which `data.validation` "
                f"holds out {self.recipe.validation:,}; received "
                f"`data.train_samples` = {wanted:,}. Use at most {kept:,}."
            )
        pairs = idx.pairs(files())
        images, labels = pairs["train"].inputs, pairs["train"].targets
        return {
            "train": Pair(images[:wanted], labels[:wanted], "MNIST"),
            "validation": Pair(images[kept:], labels[kept:], "MNIST"),
            "test": pairs["test"],
        }


def files() -> idx.Files:
    """Return the files of the package."""
    train, train_labels, test, test_labels = (
        IdxFile(FOLDER / f"{name}.gz", sha256, "Install samestep again.")
        for name, (_, sha256) in CONTENT.items()
    )
    return {"train": (train, train_labels), "test": (test, test_labels)}
