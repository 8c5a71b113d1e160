"""User data: tensors, arrays, or data sets with `__len__` and `__getitem__`."""

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from samestep.config.data import CustomData, Task
from samestep.data import pytree
from samestep.data.batches import batches_of_indices
from samestep.data.given import GivenData
from samestep.data.pytree import Nested
from samestep.data.sources.samples import (
    TARGETS,
    describe,
    pair,
    stack,
    tensor,
    tensors,
)
from samestep.data.sources.source import SPLITS
from samestep.data.splits import Converted, Loaded, Part, Split, divide
from samestep.data.stream import first_samples
from samestep.data.targets import (
    ALL_LABELS,
    DataInfo,
    Labels,
    check_labels,
    narrow,
    shaped,
    task_of,
)
from samestep.errors import OwnCodeError, did_you_mean
from samestep.user_code import seeding
from samestep.user_code.references import GIVEN, UserCode, blaming, title


@dataclass(frozen=True)
class Arrays:
    """Inputs [n, ...], one or several, and targets [n, ...] in memory."""

    inputs: Nested
    targets: Tensor
    given: GivenData | None = None
    """The DataLoader that they come from."""

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        picked = self.inputs, self.targets
        inputs, targets = pytree.apply(
            lambda values: narrow(values.index_select(0, indices)), picked
        )
        return inputs, targets


def given_of(split: Split) -> GivenData | None:
    """Return the DataLoader or stream that samples come from; None if from none."""
    match split:
        case Part(whole=inner) | Converted(split=inner):
            return given_of(inner)
        case Arrays(given=given) | Indexed(given=given):
            return given
    return None


def samples_of(split: Split) -> list[Any]:
    """Return the samples of a stream that were read."""
    while isinstance(split, Converted):
        split = split.split
    assert isinstance(split, Indexed)
    return list(split.source)


def with_samples(split: Split, samples: list[Any]) -> Split:
    """Return the split of a stream with other samples of it."""
    if isinstance(split, Converted):
        return replace(split, split=with_samples(split.split, samples))
    assert isinstance(split, Indexed)
    return replace(split, source=samples)


def is_in_memory(split: Split) -> bool:
    """Return whether samples are only picked from arrays in memory."""
    match split:
        case Part(whole=inner) | Converted(split=inner):
            return is_in_memory(inner)
    return isinstance(split, Arrays)


@dataclass(frozen=True)
class Indexed:
    """An object with `__len__` and `__getitem__`, which returns a sample."""

    source: Any
    who: str
    is_train: bool
    info: DataInfo | None = None
    """What the samples are checked for, once it is known."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of samples; None: they are stacked."""
    given: GivenData | None = None
    """The DataLoader or the stream that they come from."""

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, indices: Tensor) -> tuple[Nested, Tensor]:
        """Return inputs [b, ...] and targets [b, ...] of the samples int64 [b].

        Seeds Python's and numpy's generators from torch's, so that random draws depend
        on the micro-batch alone. Raises OwnCodeError.
        """
        if len(indices) == 0:  # a micro-batch of a short last batch
            with seeding.kept():
                first = self.gather(torch.zeros(1, dtype=torch.int64))
            inputs, targets = pytree.apply(lambda values: values[:0], first)
            return inputs, targets
        if not self.is_train:
            torch.default_generator.manual_seed(int(indices[0]))
        seed = torch.initial_seed()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        inputs, targets = self._batch(indices.tolist())
        if self.info is not None:
            targets = shaped(targets, self.info.task)
            check_labels(targets, self.info, self.who, indices)
        return inputs, targets

    def _batch(self, indices: list[int]) -> tuple[Nested, Tensor]:
        samples = []
        for index in indices:
            with blaming(f"sample {index} of {self.who}"):
                samples.append(self.source[index])
        names = f"the input of {self.who}", f"the target of {self.who}"
        if self.collate is not None:
            with blaming(f"`collate_fn` of {self.who}"):
                batch = self.collate(samples)
            inputs, targets = map(tensors, pair(batch, self.who), names)
            # Contiguous, as what comes from a helper: strides may decide bits.
            inputs = pytree.apply(lambda t: narrow(t).contiguous(), inputs)
        else:
            pairs = [pair(sample, self.who) for sample in samples]
            inputs, targets = (
                stack([tensors(p[part], who) for p in pairs], indices, who)
                for part, who in enumerate(names)
            )
        return inputs, _only(targets, self.who)


Undivided = Arrays | Indexed
LOOKED_AT = 8
"""How many samples of a stream stand for all of them before the training."""


def load(
    recipe: CustomData,
    user_code: UserCode,
    labels: Labels = ALL_LABELS,
    seed: int = 0,
) -> Loaded:
    """Return the splits and what they share. Raises OwnCodeError, DataError."""
    who = title(recipe.load, "data")
    data = None
    if recipe.load.startswith(GIVEN):
        data = user_code.find(recipe.load, "data")
    if data is None or isinstance(data, type) or _is_function(data):
        data = user_code.call(recipe.load, "data", {}, recipe.arguments)
    is_divided = isinstance(data, Mapping)
    if is_divided:
        _check_splits(data, who)
    given = data if is_divided else {"train": data}
    samples = {
        name: _samples(
            value, f"{who}, split `{name}`" if is_divided else who, name, seed
        )
        for name, value in given.items()
    }
    # A DataLoader or a stream says itself what to train on.
    is_divided = is_divided or samples["train"].given is not None
    info = _infer(samples["train"], recipe, who, labels)
    padded = any(isinstance(s, Indexed) and s.collate for s in samples.values())
    checked = {
        name: _conforming(each, info, f"{who}, split `{name}`", padded)
        for name, each in samples.items()
    }
    if not is_divided:
        return _divided(checked["train"], recipe, who), info
    splits: dict[str, Split] = dict.fromkeys(SPLITS, _part(checked["train"], []))
    return splits | {n: _as_evaluated(n, each) for n, each in checked.items()}, info


def _part(whole: Undivided, members: list[int]) -> Part:
    return Part(whole, torch.tensor(members, dtype=torch.int64))


def _as_evaluated(name: str, samples: Undivided) -> Split:
    """Return a split: for an evaluation, in the order of its DataLoader's sampler."""
    if name == "train" or samples.given is None or samples.given.is_stream:
        return samples
    batches = batches_of_indices(samples.given, 0, None)
    return _part(samples, list(chain.from_iterable(batches)))


def _is_function(value: Any) -> bool:
    return callable(value) and not hasattr(value, "__getitem__")


def _check_splits(data: Mapping[Any, Any], who: str) -> None:
    for name in data:
        if name not in SPLITS:
            raise OwnCodeError(
                f"The splits of {who} are `train`, `validation` and `test`; it has "
                f"`{name}`.{did_you_mean(str(name), SPLITS)}"
            )
    if "train" not in data:
        raise OwnCodeError(f"{who} must have a split `train`; it has {list(data)}.")


def _samples(value: Any, who: str, split: str, seed: int) -> Undivided:
    given, collate = GivenData(value, None, default_collate), None
    if isinstance(value, DataLoader):
        given = GivenData.of(value, None, None)
        collate = None if given.collate is default_collate else given.collate
    if given.is_stream and hasattr(given.data, "__iter__"):
        most = LOOKED_AT if split == "train" else None
        read = first_samples(given, seed, most)
        collate = collate or getattr(given.data, "collate_fn", None)
        samples = _of_dataset(read, who, split, collate)
        return replace(samples, given=given)
    samples = _of_dataset(given.data, who, split, collate)
    return replace(samples, given=given) if given.loader else samples


def _of_dataset(
    value: Any, who: str, split: str, collate: Callable[[list[Any]], Any] | None
) -> Undivided:
    collate = collate or getattr(value, "collate_fn", None)
    is_plain = collate is None and type(value).__name__ == "TensorDataset"
    if is_plain and len(value.tensors) == 2:
        value = value.tensors
    if isinstance(value, tuple | list) and len(value) == 2:
        samples: Undivided = _arrays(value, who)
    elif not hasattr(value, "__getitem__") or isinstance(value, Tensor | np.ndarray):
        raise OwnCodeError(
            f"{who} must give (inputs, targets), or a data set with a length and an "
            f"index; it gave {describe(value)}."
        )
    else:
        try:
            len(value)
        except TypeError:
            raise OwnCodeError(
                f"{who}: {describe(value)} has no length (`__len__`), so its samples "
                "cannot be put into an order that every worker agrees on."
            ) from None
        samples = Indexed(value, who, split == "train", collate=collate)
    if split == "train" and len(samples) == 0:
        raise OwnCodeError(f"{who} has no training samples.")
    return samples


def _arrays(given: Any, who: str) -> Arrays:
    inputs = tensors(given[0], f"the inputs of {who}")
    targets = tensor(given[1], f"the targets of {who}")
    for _, values in pytree.leaves(inputs):
        if values.dim() == 0 or targets.dim() == 0 or len(values) != len(targets):
            raise OwnCodeError(
                f"{who} must have as many targets as inputs; their shapes are "
                f"{pytree.describe(inputs)} and {list(targets.shape)}."
            )
    return Arrays(inputs, targets)


def _only(targets: Nested, who: str) -> Tensor:
    if isinstance(targets, Tensor):
        return narrow(targets)
    raise OwnCodeError(
        f"The target of a sample is one tensor; that of {who} is several, "
        f"{pytree.describe(targets)}. Give what the model needs as inputs, and join "
        "the rest."
    )


def _infer(train: Undivided, recipe: CustomData, who: str, labels: Labels) -> DataInfo:
    """Infer from the training samples what all splits share."""
    inputs, targets = train.gather(torch.zeros(1, dtype=torch.int64))
    task = recipe.task or task_of(targets, who)
    targets = shaped(targets, task)
    if task == "regression":
        outputs = recipe.outputs or targets[0].numel()
    else:
        outputs = recipe.outputs or 1 + _largest(train, task, who, labels)
    per_sample = targets[0].numel() if task == "next-token" else 1
    return DataInfo(pytree.shapes(inputs), outputs, task, per_sample, labels)


def _largest(train: Undivided, task: Task, who: str, labels: Labels) -> int:
    """Return the largest label or token of the training samples."""
    if isinstance(train, Arrays):
        values = [train.targets[labels.count(train.targets)]]
        if task == "next-token" and isinstance(train.inputs, Tensor):
            values.append(train.inputs.flatten())
        return _maximum(values)
    source = train.source
    if train.given is not None:
        source = train.given.data
    known = getattr(source, "classes", None) or _names(source)
    if task == "classification" and known is not None:
        return len(known) - 1
    known_targets = getattr(source, "targets", None)
    if known_targets is None and train.given and train.given.is_stream:
        raise OwnCodeError(
            f"How many classes or tokens {who} has is not known before its end, since "
            "it is a stream: set `data.outputs`, or give it `classes`."
        )
    if known_targets is None:
        pieces = torch.split(torch.arange(len(train)), 1000)
        all_targets = [train.gather(piece)[1] for piece in pieces]
    else:
        all_targets = [tensor(known_targets, who)]
    return _maximum([targets[labels.count(targets)] for targets in all_targets])


def _maximum(values: list[Tensor]) -> int:
    """Return the largest of all values, at least 0."""
    return max(int(some.max()) for some in (*values, torch.zeros(1)) if len(some))


def _names(source: Any) -> Any:
    """Return the names of the classes if it is a data set of Hugging Face's."""
    features = getattr(source, "features", None)
    if not isinstance(features, Mapping):
        return None
    label = next((features[key] for key in TARGETS if key in features), None)
    return getattr(label, "names", None)


def _conforming(
    samples: Undivided, info: DataInfo, who: str, is_padded: bool
) -> Undivided:
    """Return samples that conform to `info`; data sets check each batch later.

    With `is_padded`, a `collate_fn` may give each batch a length of its own. Raises
    OwnCodeError, DataError.
    """
    if len(samples) == 0:
        return samples
    inputs, _ = samples.gather(torch.zeros(1, dtype=torch.int64))
    shapes = pytree.shapes(inputs)
    if shapes != info.inputs and not is_padded:
        raise OwnCodeError(
            f"All inputs have one shape, and those of `train` have "
            f"{json.dumps(info.inputs)}; the first of {who} has {json.dumps(shapes)}."
        )
    if isinstance(samples, Indexed):
        return replace(samples, who=who, info=info)
    targets = shaped(samples.targets, info.task)
    check_labels(targets, info, who, torch.arange(len(targets)))
    return replace(samples, targets=targets)


def _divided(samples: Undivided, recipe: CustomData, who: str) -> dict[str, Split]:
    """Divide one data set into three splits; see `divide`."""
    members = divide(len(samples), recipe, who, ("validation", "test"))
    held_out = samples
    if isinstance(samples, Indexed):
        held_out = replace(samples, is_train=False)
    wholes = zip(SPLITS, (samples, held_out, held_out), strict=True)
    return {name: Part(whole, members[name]) for name, whole in wholes}
