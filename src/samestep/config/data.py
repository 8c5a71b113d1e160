"""The section of a recipe that says where the samples come from; see docs/data.md."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from samestep.config.model import Arguments, Count, Dotted, Fraction, Section, kind


PADDING = -100
"""The target that stands for none, as in torch and in Hugging Face's libraries."""
Task = Literal["classification", "next-token", "regression"]


class Augment(Section):
    """Random changes of training samples; each depends on seed, epoch and sample."""

    shift: Annotated[int, Field(ge=0)] = 0
    """Moves an image by up to so many pixels, each way; zeros move in."""
    crop: Annotated[int, Field(ge=0)] = 0
    """Cuts the image out of itself with so many pixels mirrored around it."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that left and right are exchanged."""
    mixup: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Mixes each sample with another of its micro-batch, in shares from
    Beta(mixup, mixup); 0: none."""


class _Source(Section):
    source: str
    augment: Augment | None = None
    """Random changes of the training samples."""


class MnistData(_Source):
    """The 70,000 handwritten digits that come with the package."""

    source: Literal["mnist"] = "mnist"
    train_samples: Count | None = None
    """Train on only the first so many images; all by default."""
    validation: Annotated[int, Field(ge=0, lt=60_000)] = 5_000
    """How many of the last training images are held out for validation."""


class TextData(Section):
    """The characters of a text, to predict each from those before it."""

    source: Literal["text"] = "text"
    path: str
    """A UTF-8 file, or a folder; `python`: the sources of Python's standard library."""
    pattern: str = "*.py"
    """Which files of a folder; `**/*.txt` also takes those in folders below it."""
    context: Count = 128
    """Characters of a sample."""
    lines: bool = False
    """Every line is a sample, padded to `context`, and a longer one several; instead of
    windows of the whole text."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    """The share at the end that is the test split; the same before it: validation."""

    unsaid = frozenset({"lines"})


class Divided(_Source):
    """A source of which shares are held out."""

    validation: Fraction = 0.1
    """Share of the training samples held out for validation, if none are given."""
    test: Fraction = 0.1
    """The same for the test."""
    split_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Draws these: not the seed of the recipe, so that all seeds share one test."""


class _Arrays(Divided):
    task: Task | None = None
    """By default what the targets look like."""
    outputs: Count | None = None
    """Classes or different tokens; by default the largest in `train`, plus one."""


class CustomData(_Arrays):
    """Samples of your own: what a function returns; see docs/own-code.md."""

    source: Literal["custom"] = "custom"
    load: Dotted
    """`module:function`; or `sha256:...`, which only a Python caller can give."""
    arguments: Arguments = Field(default_factory=dict)
    """Passed to the function by name."""


class IdxData(Divided):
    """A directory with the four files of MNIST and its likes, perhaps packed (.gz)."""

    source: Literal["idx"] = "idx"
    path: str
    """With train-images-idx3-ubyte, train-labels-idx1-ubyte, and for the test the same
    with t10k."""


class FashionData(Divided):
    """Fashion-MNIST: 70,000 articles of clothing in ten classes."""

    source: Literal["fashion-mnist"] = "fashion-mnist"
    path: str | None = None
    """Where its four files are; by default where Debian's package puts them."""


class NpzData(_Arrays):
    """An .npz file with x_train, y_train and perhaps x_validation, x_test and so on."""

    source: Literal["npz"] = "npz"
    path: str
    """The file."""
    channels_last: bool = False
    """Images are [n, height, width, channels]."""


class NpyData(_Arrays):
    """Arrays in .npy files, which are mapped and may be larger than the memory."""

    source: Literal["npy"] = "npy"
    inputs: str
    """[n, ...]: of the training samples, or of all."""
    targets: str
    """[n] or [n, ...]"""
    test_inputs: str | None = None
    """The same of the test; both or none."""
    test_targets: str | None = None
    """The same of the test."""
    channels_last: bool = False
    """Images are [n, height, width, channels]."""

    @model_validator(mode="after")
    def _test_is_a_pair(self) -> Self:
        if (self.test_inputs is None) != (self.test_targets is None):
            raise ValueError("`data.test_inputs` and `data.test_targets` go together")
        return self


class ImageData(Divided):
    """A folder with one folder of images for each class."""

    source: Literal["images"] = "images"
    path: str
    """The folder; the names of the folders in it, sorted, are the classes."""
    test_path: str | None = None
    """A folder like that for the test."""
    size: Count = 32
    """Width and height: images are scaled, and what then overlaps is cut off."""
    channels: Literal[1, 3] = 3
    """Grey or RGB."""
    skip_bad: bool = False
    """Go on without images that cannot be read; they are counted in the result."""


class TableData(Divided):
    """A table, CSV or Parquet, of which one column is to be predicted."""

    source: Literal["table"] = "table"
    path: str
    """A file that ends with .csv or .parquet."""
    test_path: str | None = None
    """A table like that for the test."""
    target: str
    """The column to predict."""
    ignore: tuple[str, ...] = Field((), strict=False)
    """Columns to leave out."""
    task: Literal["classification", "regression"] | None = None
    """By default regression if the target has fractions, else classification."""
    missing: Literal["error", "mean"] = "error"
    """What stands for a missing value: nothing, or the training samples' mean."""


DataRecipe = Annotated[
    Annotated[MnistData, Tag("mnist")]
    | Annotated[TextData, Tag("text")]
    | Annotated[CustomData, Tag("custom")]
    | Annotated[IdxData, Tag("idx")]
    | Annotated[FashionData, Tag("fashion-mnist")]
    | Annotated[NpzData, Tag("npz")]
    | Annotated[NpyData, Tag("npy")]
    | Annotated[ImageData, Tag("images")]
    | Annotated[TableData, Tag("table")],
    Discriminator(kind("source", "mnist")),
]
