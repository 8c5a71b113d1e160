"""The splits of all sources but the user's: rows of arrays, and windows of texts."""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from samestep.config.data import (
    PADDING,
    MnistData,
    NpyData,
    NpzData,
    TableData,
    Task,
    TextData,
)
from samestep.data.sources import mnist, tables, text
from samestep.data.sources.source import SPLITS, Array, ArraySource, Pair
from samestep.data.splits import Converted, Loaded, Part, Split, divide
from samestep.data.targets import (
    ALL_LABELS,
    DataInfo,
    Labels,
    check_labels,
    shaped,
    task_of,
)
from samestep.errors import DataError


MOST_MEASURED = 10_000
"""At most this many training samples, evenly spaced, determine the normalization."""
MEASURED_AT_ONCE = 500
LEAST_DEVIATION = 1e-3
CHECKED_AT_ONCE = 100_000


@dataclass(frozen=True)
class Rows:
    """Inputs [n, ...] and targets [n, ...]; only the rows asked for are read."""

    inputs: Array
    targets: Array
    task: Task
    channels_last: bool = False
    normal: tuple[Tensor, Tensor] | None = None
    """For bytes: a factor, and what is then subtracted, float32, for each channel."""

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = indices.numpy()
        inputs = _tensor(self.inputs[rows])
        if inputs.dim() == 3:
            inputs = inputs.unsqueeze(1)
        elif inputs.dim() == 4 and self.channels_last:
            inputs = inputs.movedim(-1, 1)
        if self.normal is not None:
            factor, less = self.normal
            inputs = inputs.float().mul_(factor).sub_(less)
        elif not inputs.is_floating_point():
            inputs = inputs.long()
        targets = shaped(_tensor(self.targets[rows]), self.task)
        return inputs.contiguous(), targets


@dataclass(frozen=True)
class ByteRows:
    """The samples of a split whose inputs are bytes in memory, for kernels."""

    values: Array
    """uint8 [n, ...]"""
    targets: Array
    """int64 [n] or floats [n, values], for all n rows."""
    members: Array | None
    """int64: the rows that are the split's samples; None: all, in order."""
    normal: tuple[Tensor, Tensor]
    """A factor, and what is then subtracted, for each channel."""
    address: int
    """Where the values are."""


def byte_rows(split: Split) -> ByteRows | None:
    """Return the bytes behind a split; None if its inputs are not rows of bytes."""
    match split:
        case Converted(split=inner):
            return byte_rows(inner)
        case Part(whole=inner, members=members):
            rows = byte_rows(inner)
            if rows is None:
                return None
            own = members.numpy()
            own = own if rows.members is None else rows.members[own]
            return replace(rows, members=own)
        case Rows(normal=normal, channels_last=False) if normal is not None:
            values, targets = (
                split.inputs,
                shaped(_tensor(split.targets.copy()), split.task),
            )
            if values.dtype == np.uint8 and values.flags.c_contiguous:
                address: int = values.ctypes.data
                return ByteRows(values, targets.numpy(), None, normal, address)
    return None


@dataclass(frozen=True)
class Windows:
    """Windows of a text, each to predict from it the window one character later."""

    tokens: Tensor
    """int32 [n], of the whole text."""
    starts: Tensor
    """int64 [windows]"""
    lengths: Tensor
    """int64 [windows]: how many targets each of them has."""
    context: int
    is_padded: bool
    """Whether some windows are shorter than `context`."""

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return windows int64 [b, context] and targets of the same shape.

        Behind the end of a window inputs are 0, the first character of the vocabulary.
        """
        places = self.starts[indices].unsqueeze(1) + torch.arange(self.context + 1)
        if not self.is_padded:
            windows = self.tokens[places].long()
            return windows[:, :-1], windows[:, 1:]
        windows = self.tokens[places.clamp(max=len(self.tokens) - 1)].long()
        is_behind = torch.arange(self.context) >= self.lengths[indices].unsqueeze(1)
        inputs, targets = windows[:, :-1], windows[:, 1:]
        return inputs.masked_fill(is_behind, 0), targets.masked_fill(is_behind, PADDING)


def array_rows(source: ArraySource, labels: Labels) -> Loaded:
    """Return splits of arrays and what they share. Raises DataError, OwnCodeError."""
    pairs, recipe = source.arrays(), source.recipe
    for pair in pairs.values():
        _check_numbers(pair)
    train = pairs["train"]
    if len(train.targets) == 0:
        raise DataError(f"{train.who} has no training samples.")
    options = recipe if isinstance(recipe, NpyData | NpzData) else None
    task = (options and options.task) or task_of(_some(train.targets, 0, 1), train.who)
    outputs = options and options.outputs
    last = options is not None and options.channels_last
    rows = {s: Rows(p.inputs, p.targets, task, last) for s, p in pairs.items()}
    inputs, targets = rows["train"].gather(torch.zeros(1, dtype=torch.int64))
    info = DataInfo(
        tuple(inputs.shape[1:]),
        outputs or _outputs(train, task, labels),
        task,
        targets[0].numel() if task == "next-token" else 1,
        labels,
    )
    for pair in pairs.values():
        _check(pair, train, info)
    if task == "classification" and labels.are_checked and not outputs:
        _check_classes(train, info)
    held_out = tuple(name for name in SPLITS if name not in pairs)
    members = divide(len(train.targets), recipe, train.who, held_out)
    if train.inputs.dtype == np.uint8 and task != "next-token":
        normal = _normal(rows["train"], members["train"])
        rows = {split: replace(each, normal=normal) for split, each in rows.items()}
    splits: dict[str, Split] = {s: Part(rows["train"], members[s]) for s in SPLITS}
    return splits | {s: rows[s] for s in rows if s != "train"}, info


def mnist_images(recipe: MnistData) -> Loaded:
    """Return the splits of MNIST and what they share. Raises DataError."""
    factor = torch.tensor([1 / (255 * mnist.STD)])
    normal = factor, torch.tensor([mnist.MEAN / mnist.STD])
    splits = {
        name: Rows(pair.inputs, pair.targets, "classification", normal=normal)
        for name, pair in mnist.MnistSource(recipe).arrays().items()
    }
    return splits, DataInfo(mnist.SHAPE, mnist.NUM_CLASSES, "classification")


def text_windows(recipe: TextData) -> Loaded:
    """Return windows of a text and what they share. Raises DataError."""
    read, context = text.read(recipe), recipe.context
    tokens = torch.from_numpy(read.tokens)
    splits = {}
    for name, (first, end) in read.windows.items():
        starts = torch.from_numpy(read.starts[first:end])
        lengths = torch.from_numpy(read.lengths[first:end])
        splits[name] = Windows(tokens, starts, lengths, context, recipe.lines)
    return splits, DataInfo((context,), len(read.vocabulary), "next-token", context)


def table_rows(recipe: TableData) -> Loaded:
    """Return splits of a table and what they share. Raises DataError."""
    table = tables.read(recipe)
    held_out = ("validation",) if recipe.test_path else ("validation", "test")
    members = divide(table.num_first, recipe, recipe.path, held_out)
    if recipe.test_path:
        members["test"] = torch.arange(table.num_first, len(table))
    inputs = table.inputs(members["train"].numpy())
    task: Task = "regression" if table.is_regression else "classification"
    rows = Rows(inputs, table.targets(), task)
    info = DataInfo((inputs.shape[1],), len(table.classes) or 1, task)
    return {split: Part(rows, members[split]) for split in SPLITS}, info


def _tensor(array: Array) -> Tensor:
    """Return a tensor, in native byte order and a type that torch has.

    It may share the memory of `array`, which must be writable.
    """
    floats = np.float64 if array.dtype.itemsize > 4 else np.float32
    kinds = {"f": floats, "i": np.int64, "u": np.int64, "b": np.int64}
    kind = np.uint8 if array.dtype == np.uint8 else kinds[array.dtype.kind]
    return torch.from_numpy(np.asarray(array, kind, order="C"))


def _some(array: Array, first: int, end: int) -> Tensor:
    """Return a copy of some rows as a tensor."""
    return _tensor(array[first:end].copy())


def _outputs(train: Pair, task: Task, labels: Labels) -> int:
    if task == "regression":
        return int(np.prod(train.targets.shape[1:]))
    largest = int(_valid(train.targets, labels).max(initial=0))
    if task == "next-token":
        largest = max(largest, int(train.inputs.max()))
    return 1 + largest


def _valid(targets: Array, labels: Labels) -> Array:
    """Return the targets that count, without a copy if all do."""
    if labels.ignored is None:
        return np.asarray(targets)
    return np.asarray(targets[targets != labels.ignored])


def _check_numbers(pair: Pair) -> None:
    for what, array in (("inputs", pair.inputs), ("targets", pair.targets)):
        if array.dtype.kind not in "biuf":
            raise DataError(
                f"Arrays hold integers or floats; the {what} of {pair.who} are "
                f"{array.dtype}."
            )
    shapes = list(pair.inputs.shape), list(pair.targets.shape)
    if not all(shapes) or shapes[0][0] != shapes[1][0]:
        raise DataError(
            "There must be as many targets as inputs; those of "
            f"{pair.who} have the shapes {shapes[1]} and {shapes[0]}."
        )


def _check(pair: Pair, train: Pair, info: DataInfo) -> None:
    """Raise DataError unless a split has the shapes and types of `train`."""
    for what in ("inputs", "targets"):
        shape, expected = getattr(pair, what).shape[1:], getattr(train, what).shape[1:]
        if shape != expected:
            raise DataError(
                f"All splits have {what} of one shape; those of {train.who} have "
                f"{list(expected)}, those of {pair.who} {list(shape)}."
            )
    if (pair.inputs.dtype == np.uint8) != (train.inputs.dtype == np.uint8):
        raise DataError(
            f"All splits have inputs of one type; those of {train.who} are "
            f"{train.inputs.dtype}, those of {pair.who} {pair.inputs.dtype}."
        )
    for first in range(0, len(pair.targets), CHECKED_AT_ONCE):
        end = min(first + CHECKED_AT_ONCE, len(pair.targets))
        numbers = torch.arange(first, end)
        targets = shaped(_some(pair.targets, first, end), info.task)
        check_labels(targets, info, pair.who, numbers)
        if info.task == "next-token":
            tokens = _some(pair.inputs, first, end).long()
            check_labels(tokens, replace(info, labels=ALL_LABELS), pair.who, numbers)
        finite = targets.float().isfinite()  # as most recipes take them
        if info.task == "regression" and not finite.all():
            bad = int((~finite).flatten(1).any(1).nonzero()[0]) + first
            raise DataError(
                f"Targets are finite numbers; sample {bad} of {pair.who} has another."
            )


def _check_classes(train: Pair, info: DataInfo) -> None:
    outputs = info.outputs
    targets = _valid(train.targets, info.labels).ravel().astype(np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=outputs) == 0)
    if len(empty):
        raise DataError(
            f"Every class from 0 to the largest label, {outputs - 1}, has training "
            f"samples; {train.who} has none of class "
            f"{', '.join(map(str, empty[:8].tolist()))}. Number the classes without "
            f"gaps, or set `data.outputs = {outputs}` if the gaps are on purpose."
        )


def _normal(rows: Rows, members: Tensor) -> tuple[Tensor, Tensor]:
    """Return factor and offset that give training bytes mean 0 and deviation 1.

    For images they are by channel. They are computed from exact counts of the 256
    values, so no order of additions changes them. A constant channel is only shifted.
    """
    chosen = members[:: max(1, -(-len(members) // MOST_MEASURED))]
    counts: Tensor | int = 0
    for piece in torch.split(chosen, MEASURED_AT_ONCE):
        inputs, _ = rows.gather(piece)
        is_image = inputs.dim() == 4
        planes = inputs.transpose(0, 1).flatten(1) if is_image else inputs.view(1, -1)
        counts = counts + torch.stack([p.bincount(minlength=256) for p in planes])
    assert isinstance(counts, Tensor)
    values = torch.arange(256)
    number = counts.sum(dim=1)
    total, squares = (counts * values).sum(dim=1), (counts * values * values).sum(dim=1)
    mean = total.double() / number
    # math.sqrt, since torch's is not rounded correctly on every processor.
    variances = (squares.double() / number - mean.square()).clamp(0).tolist()
    deviation = torch.tensor([math.sqrt(v) for v in variances], dtype=torch.float64)
    deviation[deviation < LEAST_DEVIATION] = 255.0
    shape = (-1, 1, 1) if is_image else (1, 1)
    return (
        (1 / deviation).float().view(shape),
        (mean / deviation).float().view(shape),
    )
