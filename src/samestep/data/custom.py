"""Data of the user's own: tensors, arrays, or data sets with a length and an index."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.data.facts import Facts, check_labels, narrow, shaped, task_of
from samestep.data.splits import Part, divide
from samestep.data_sections import CustomData, Task
from samestep.errors import OwnCodeError, did_you_mean
from samestep.own import GIVEN, OwnCode, blaming, title


SPLITS = ("train", "validation", "test")
TARGETS = ("label", "labels", "target", "targets", "y")
INPUTS = ("input_ids", "pixel_values", "image", "img", "inputs", "input", "x")
"""Keys of samples that are dictionaries, as Hugging Face's data sets have them."""


@dataclass(frozen=True)
class Arrays:
    """Inputs [n, ...] and targets [n, ...] in memory."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...]."""
        picked = (t.index_select(0, indices) for t in (self.inputs, self.targets))
        inputs, targets = map(narrow, picked)
        return inputs, targets


@dataclass(frozen=True)
class Indexed:
    """An object with `len(...)` and `[index]`, which gives a sample."""

    source: Any
    who: str
    is_train: bool
    task: Task | None = None
    outputs: int | None = None
    shape: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [b] -> inputs [b, ...] and targets [b, ...].

        What samples draw from Python's and numpy's generators then depends, like what
        they draw from torch's, on the micro-batch alone. Raises OwnCodeError.
        """
        if len(indices) == 0:  # a micro-batch of a short last batch
            return torch.empty(0, *self.shape), torch.empty(0, dtype=torch.int64)
        if not self.is_train:
            torch.default_generator.manual_seed(int(indices[0]))
        seed = torch.initial_seed()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with blaming(self.who):
            pairs = [_pair(self.source[i], self.who) for i in indices.tolist()]
        inputs = _stack([pair[0] for pair in pairs], indices, self.who)
        targets = _stack([pair[1] for pair in pairs], indices, self.who)
        if self.task is not None:
            targets = shaped(targets, self.task)
            check_labels(targets, self.task, self.outputs, self.who, indices)
        return inputs, targets


Samples = Arrays | Indexed


def load(recipe: CustomData, own: OwnCode) -> tuple[dict[str, Samples | Part], Facts]:
    """The splits and what they share. Raises OwnCodeError, DataError."""
    who = title(recipe.load, "data")
    found = own.find(recipe.load, "data") if recipe.load.startswith(GIVEN) else None
    if found is None or isinstance(found, type) or _is_function(found):
        found = own.call(recipe.load, "data", {}, recipe.arguments)
    if isinstance(found, Mapping):
        splits = _of_mapping(found, who)
    else:
        splits = {"train": _samples(found, who, is_train=True)}
    facts = _facts(splits["train"], recipe, who)
    checked = {
        name: _conforming(samples, facts, f"{who}, split `{name}`")
        for name, samples in splits.items()
    }
    if isinstance(found, Mapping):
        none = torch.zeros(0, dtype=torch.int64)
        empty = Part(checked["train"], none)
        return {name: checked.get(name, empty) for name in SPLITS}, facts
    return dict(_divided(checked["train"], recipe, who)), facts


def _is_function(found: Any) -> bool:
    return callable(found) and not hasattr(found, "__getitem__")


def _of_mapping(found: Mapping[Any, Any], who: str) -> dict[str, Samples]:
    for name in found:
        if name not in SPLITS:
            raise OwnCodeError(
                f"The splits of {who} are `train`, `validation` and `test`; it has "
                f"`{name}`.{did_you_mean(str(name), SPLITS)}"
            )
    if "train" not in found:
        raise OwnCodeError(f"{who} must have a split `train`; it has {list(found)}.")
    return {
        name: _samples(value, f"{who}, split `{name}`", name == "train")
        for name, value in found.items()
    }


def _samples(value: Any, who: str, is_train: bool) -> Samples:
    if type(value).__name__ == "TensorDataset" and len(value.tensors) == 2:
        value = value.tensors
    if isinstance(value, tuple | list) and len(value) == 2:
        samples: Samples = _arrays(value, who)
    elif not hasattr(value, "__getitem__") or isinstance(value, Tensor | np.ndarray):
        raise OwnCodeError(
            f"{who} must give (inputs, targets), or a data set with a length and an "
            f"index; it gave {_describe(value)}."
        )
    else:
        try:
            len(value)
        except TypeError:
            raise OwnCodeError(
                f"{who}: {_describe(value)} has no length (`__len__`), so its samples "
                "cannot be put into an order that every worker agrees on."
            ) from None
        samples = Indexed(value, who, is_train)
    if is_train and len(samples) == 0:
        raise OwnCodeError(f"{who} has no training samples.")
    return samples


def _arrays(pair: Any, who: str) -> Arrays:
    inputs, targets = (_tensor(each, who) for each in pair)
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise OwnCodeError(
            f"{who} must have as many targets as inputs; their shapes are "
            f"{list(inputs.shape)} and {list(targets.shape)}."
        )
    return Arrays(inputs, targets)


def _facts(train: Samples, recipe: CustomData, who: str) -> Facts:
    inputs, targets = train.gather(torch.zeros(1, dtype=torch.int64))
    task = recipe.task or task_of(targets, who)
    targets = shaped(targets, task)
    shape = tuple(inputs.shape[1:])
    if task == "regression":
        outputs = recipe.outputs or targets[0].numel()
    else:
        outputs = recipe.outputs or 1 + _largest(train, task, who)
    per_sample = targets[0].numel() if task == "next-token" else 1
    return Facts(shape, outputs, task, per_sample)


def _largest(train: Samples, task: Task, who: str) -> int:
    """The largest label or token of the training samples."""
    if isinstance(train, Arrays):
        both = (
            [train.targets, train.inputs] if task == "next-token" else [train.targets]
        )
        return max(int(values.max()) for values in both)
    known = getattr(train.source, "classes", None) or _names(train.source)
    if task == "classification" and known is not None:
        return len(known) - 1
    labels = getattr(train.source, "targets", None)
    if labels is None:
        pieces = torch.split(torch.arange(len(train)), 1000)
        return max(int(train.gather(piece)[1].max()) for piece in pieces)
    return int(_tensor(labels, who).max())


def _names(source: Any) -> Any:
    """Of the classes, as Hugging Face's `datasets` have them; None if they are not."""
    features = getattr(source, "features", None)
    if not isinstance(features, Mapping):
        return None
    label = next((features[key] for key in TARGETS if key in features), None)
    return getattr(label, "names", None)


def _conforming(samples: Samples, facts: Facts, who: str) -> Samples:
    """Checked against the facts, as far as that takes no pass over a data set."""
    if len(samples) == 0:
        return samples
    inputs, _ = samples.gather(torch.zeros(1, dtype=torch.int64))
    if tuple(inputs.shape[1:]) != facts.inputs:
        raise OwnCodeError(
            f"All inputs have one shape, and those of `train` have "
            f"{list(facts.inputs)}; the first of {who} has {list(inputs.shape[1:])}."
        )
    if isinstance(samples, Indexed):
        return Indexed(
            *(samples.source, who, samples.is_train),
            *(facts.task, facts.outputs, facts.inputs),
        )
    targets = shaped(samples.targets, facts.task)
    check_labels(targets, facts.task, facts.outputs, who, torch.arange(len(targets)))
    return Arrays(samples.inputs, targets)


def _divided(
    samples: Samples, recipe: CustomData, who: str
) -> dict[str, Samples | Part]:
    """One data set in three: the test first, then validation, in a drawn order."""
    members = divide(len(samples), recipe, who, ("validation", "test"))
    held_out = samples
    if isinstance(samples, Indexed):
        held_out = replace(samples, is_train=False)
    return {
        name: Part(samples if name == "train" else held_out, members[name])
        for name in SPLITS
    }


def _pair(sample: Any, who: str) -> tuple[Any, Any]:
    if isinstance(sample, Mapping):
        target = next((key for key in TARGETS if key in sample), None)
        others = [key for key in sample if key != target]
        first = next((key for key in INPUTS if key in sample), None)
        chosen = others[0] if len(others) == 1 else first
        if target is not None and chosen is not None:
            return sample[chosen], sample[target]
        keys = ", ".join(map(str, sample))
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    else:
        keys = _describe(sample)
    raise OwnCodeError(
        f"A sample of {who} is (input, target), or a dictionary with one of the keys "
        f"{', '.join(TARGETS)} for the target and one other key, or one of "
        f"{', '.join(INPUTS)}, for the input; received {keys}."
    )


def _stack(values: list[Any], indices: Tensor, who: str) -> Tensor:
    tensors = [_tensor(value, who) for value in values]
    for tensor, index in zip(tensors, indices.tolist(), strict=True):
        if tensor.shape != tensors[0].shape:
            raise OwnCodeError(
                f"All samples have one shape; sample {index} of {who} has "
                f"{list(tensor.shape)}, sample {int(indices[0])} "
                f"{list(tensors[0].shape)}."
            )
    return narrow(torch.stack(tensors))


def _tensor(value: Any, who: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "getbands"):
        return _picture(value)
    try:
        # As an array first: a list of arrays is slow otherwise, and images have one.
        return (
            torch.from_numpy(np.array(value))
            if not isinstance(value, np.ndarray)
            else torch.as_tensor(value if value.flags.writeable else value.copy())
        )
    except (TypeError, ValueError) as error:
        raise OwnCodeError(
            f"{who} must give tensors or arrays of numbers; {_describe(value)} is "
            f"neither: {error}."
        ) from None


def _picture(image: Any) -> Tensor:
    """One of Pillow -> [channels, height, width]; bytes become floats from 0 to 1."""
    pixels = torch.from_numpy(np.array(image))
    planes = pixels.view(*pixels.shape[:2], -1).movedim(-1, 0)
    return planes / 255 if planes.dtype == torch.uint8 else planes


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    return f"{kind} {list(shape)}" if shape is not None else f"an object {kind}"
