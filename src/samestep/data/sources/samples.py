"""Turns samples of user data sets into tensors, and stacks them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samestep.data import pytree
from samestep.data.pytree import Nested
from samestep.data.targets import narrow
from samestep.errors import OwnCodeError


TARGETS = ("label", "labels", "target", "targets", "y")
"""Keys of the target in samples that are dictionaries."""
NUMBERS = "biuf"
"""Kinds of numpy dtypes that become tensors."""


def pair(sample: Any, who: str) -> tuple[Any, Any]:
    """Return the input and the target of one sample. Raises OwnCodeError.

    In a dictionary, as from Hugging Face's data sets, everything but the target is the
    input: a dictionary again, unless it is one value.
    """
    if isinstance(sample, Mapping):
        target = next((key for key in TARGETS if key in sample), None)
        others = {key: sample[key] for key in sample if key != target}
        if target is not None and others:
            inputs = next(iter(others.values())) if len(others) == 1 else others
            return inputs, sample[target]
        received = f"the keys {', '.join(map(str, sample))}"
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    else:
        received = describe(sample)
    raise OwnCodeError(
        f"A sample of {who} is (input, target), or a dictionary with one of the keys "
        f"{', '.join(TARGETS)} for the target and at least one other for the input; "
        f"received {received}."
    )


def tensors(value: Any, who: str) -> Nested:
    """Return `value` with its arrays, pictures and numbers as tensors.

    A dictionary stays one, and so does a tuple of tensors, arrays or dictionaries;
    other tuples, and lists, are arrays. Raises OwnCodeError.
    """
    if isinstance(value, Mapping):
        if not value or not all(isinstance(key, str) for key in value):
            raise OwnCodeError(
                "Inputs in a dictionary have names, which become the model's keyword "
                f"arguments; those of {who} have the keys {list(value)}."
            )
        return {key: tensors(each, f"`{key}` of {who}") for key, each in value.items()}
    if isinstance(value, tuple) and any(map(_is_whole, value)):
        return tuple(
            tensors(each, f"input {number} of {who}")
            for number, each in enumerate(value)
        )
    return tensor(value, who)


def _is_whole(value: Any) -> bool:
    """Return whether a value is a whole input, not a number or a row of one."""
    return isinstance(value, Tensor | np.ndarray | Mapping) or hasattr(
        value, "getbands"
    )


def tensor(value: Any, who: str) -> Tensor:
    """Return one tensor of real numbers or booleans. Raises OwnCodeError."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise _complex(who, value.dtype)
        return value.detach()
    if hasattr(value, "getbands"):
        return _picture(value)
    try:
        # Through numpy: torch is slow with lists of arrays, and takes no images.
        array = value if isinstance(value, np.ndarray) else np.array(value)
    except ValueError as error:
        raise OwnCodeError(
            f"{who} must be of one shape, a tensor or an array: {error}."
        ) from None
    if array.dtype.kind == "c":
        raise _complex(who, array.dtype)
    if array.dtype.kind not in NUMBERS:
        raise OwnCodeError(
            f"Samples are numbers, in tensors or arrays; {who} has {_quoted(value)}. "
            "Encode it, or leave it out."
        )
    is_ours = not isinstance(value, np.ndarray) or value.flags.writeable
    return torch.from_numpy(array if is_ours else array.copy())


def stack(values: Sequence[Any], indices: Sequence[int], who: str) -> Any:
    """Stack the results of `tensors` for samples to [b, ...]. Raises OwnCodeError."""
    parts = [dict(pytree.leaves(value)) for value in values]
    first = {name: part.shape for name, part in parts[0].items()}
    for value, index, part in zip(values, indices, parts, strict=True):
        if {name: tensor.shape for name, tensor in part.items()} != first:
            raise OwnCodeError(
                f"All samples have one shape: {who} has {pytree.describe(value)} in "
                f"sample {index}, {pytree.describe(values[0])} in sample {indices[0]}. "
                "Pad them to one length, or give the data set a `collate_fn` that does."
            )
    stacked = (narrow(torch.stack([part[name] for part in parts])) for name in first)
    return pytree.restore(pytree.apply(lambda _: None, values[0]), stacked)


def _complex(who: str, kind: Any) -> OwnCodeError:
    return OwnCodeError(
        f"Samples are real numbers; {who} has {kind}. Give real and imaginary parts, "
        "as from `torch.view_as_real`."
    )


def _picture(image: Any) -> Tensor:
    """Convert a Pillow image to [channels, height, width]; bytes become 0..1."""
    pixels = torch.from_numpy(np.array(image))
    planes = pixels.view(*pixels.shape[:2], -1).movedim(-1, 0)
    return planes / 255 if planes.dtype == torch.uint8 else planes


def _quoted(value: Any) -> str:
    is_short = isinstance(value, str | bytes) or value is None
    return f"{value!r}"[:60] if is_short else describe(value)


def describe(value: Any) -> str:
    """Return how a message describes a value: type and shape, or type of elements."""
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    if shape is not None:
        return f"{kind} {list(shape)}"
    if isinstance(value, list | tuple):
        return f"a {kind} of {type(value[0]).__name__}" if value else f"an empty {kind}"
    return f"an object of type `{kind}`"
