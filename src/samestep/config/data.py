"""The section `[data]` of a recipe: where the samples come from; see docs/data.md."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from samestep.config.model import (
    Arguments,
    Count,
    Dotted,
    Fraction,
    Section,
    default_kind,
)


PADDING = -100
"""The target of padding, as in PyTorch and in Hugging Face's libraries."""
Task = Literal["classification", "next-token", "regression"]


class Augment(Section):
    """Random changes of training samples; each depends on seed, epoch and sample."""

    shift: Annotated[int, Field(ge=0)] = 0
    """Move an image by up to this many pixels in each direction; zeros fill the gap."""
    crop: Annotated[int, Field(ge=0)] = 0
    """Pad an image by this many mirrored pixels on each side, then crop at random."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of a horizontal flip."""
    mixup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Mix each sample with another of its micro-batch, in shares from
    Beta(mixup, mixup); 0: off."""


class _Source(Section):
    source: str
    augment: Augment | None = None
    """Random changes of the training samples."""


class MnistData(_Source):
    """The 70,000 handwritten digits that come with the package."""

    source: Literal["mnist"] = "mnist"
    train_samples: Count | None = None
    """Train on this many images, the first ones; by default on all."""
    validation: Annotated[int, Field(ge=0, lt=60_000)] = 5_000
    """Training images, the last ones, that are held out for validation."""


class TextData(Section):
    """The characters of a text; each is predicted from those before it."""

    source: Literal["text"] = "text"
    path: str
    """A UTF-8 file, or a folder; `python`: the sources of Python's standard library."""
    pattern: str = "*.py"
    """Which files of a folder; `**/*.txt` also takes those in folders below it."""
    context: Count = 128
    """Characters of a sample."""
    lines: bool = False
    """Make every line a sample, padded to `context` (a longer line several), instead of
    cutting the whole text into windows."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """Share at the end of the text for the test; as much before it for validation."""

    omit_if_default = frozenset({"lines"})


class Divided(_Source):
    """A source without given splits, of which shares are held out."""

    validation: Fraction = 0.1
    """Share of the samples held out for validation, if the source has none."""
    test: Fraction = 0.1
    """Share of the samples held out for the test, if the source has none."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of this division: not the recipe's, so that all seeds share one test."""


class _Arrays(Divided):
    task: Task | None = None
    """By default inferred from the targets."""
    outputs: Count | None = None
    """Number of classes or of tokens; by default the largest in `train`, plus one."""


class CustomData(_Arrays):
    """Your own samples, which a function returns; see docs/own-code.md."""

    source: Literal["custom"] = "custom"
    load: Dotted
    """`module:function`; or `sha256:...` for an object given in Python."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments for the function."""


class IdxData(Divided):
    """A directory with the four files of MNIST and its likes, perhaps gzipped."""

    source: Literal["idx"] = "idx"
    path: str
    """The directory: train-images-idx3-ubyte, train-labels-idx1-ubyte, and for the test
    the same with t10k."""


class FashionData(Divided):
    """Fashion-MNIST: 70,000 articles of clothing in ten classes."""

    source: Literal["fashion-mnist"] = "fashion-mnist"
    path: str | None = None
    """Directory of its four files; by default that of Debian's package."""


class NpzData(_Arrays):
    """An .npz file with x_train, y_train and perhaps x_validation, x_test and so on."""

    source: Literal["npz"] = "npz"
    path: str
    """The file."""
    channels_last: bool = False
    """Whether images are [n, height, width, channels]."""


class NpyData(_Arrays):
    """Arrays in .npy files, which are mapped and may be larger than the memory."""

    source: Literal["npy"] = "npy"
    inputs: str
    """File of the inputs [n, ...] of the training samples, or of all."""
    targets: str
    """File of the targets [n] or [n, ...]."""
    test_inputs: str | None = None
    """File of the test's inputs; needs `test_targets`."""
    test_targets: str | None = None
    """File of the test's targets; needs `test_inputs`."""
    channels_last: bool = False
    """Whether images are [n, height, width, channels]."""

    @model_validator(mode="after")
    def _test_is_a_pair(self) -> Self:
        if (self.test_inputs is None) != (self.test_targets is None):
            raise ValueError("`data.test_inputs` and `data.test_targets` go together")
        return self


class ImageData(Divided):
    """A folder with one folder of images for each class."""

    source: Literal["images"] = "images"
    path: str
    """The folder; its subfolders, sorted by name, are the classes."""
    test_path: str | None = None
    """A folder of the same kind for the test."""
    size: Count = 32
    """Width and height: images are scaled and cropped to a square."""
    channels: Literal[1, 3] = 3
    """1: greyscale, 3: RGB."""
    skip_bad: bool = False
    """Skip images that cannot be read; their number is in the result."""


class TableData(Divided):
    """A table, CSV or Parquet, of which one column is predicted."""

    source: Literal["table"] = "table"
    path: str
    """A .csv or .parquet file."""
    test_path: str | None = None
    """A table of the same kind for the test."""
    target: str
    """The column to predict."""
    ignore: tuple[str, ...] = Field((), strict=False)
    """Columns to leave out."""
    task: Literal["classification", "regression"] | None = None
    """By default regression if the target is a column of floats."""
    missing: Literal["error", "mean"] = "error"
    """Refuse missing values, or replace them by the training samples' mean."""


DataRecipe = Annotated[
    MnistData
    | TextData
    | CustomData
    | IdxData
    | FashionData
    | NpzData
    | NpyData
    | ImageData
    | TableData,
    Field(discriminator="source"),
    default_kind("source", "mnist"),
]
