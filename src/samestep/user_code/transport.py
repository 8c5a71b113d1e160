"""Objects that a Python caller gives to `samestep.train`, on their way to the workers.

The only place that unpickles. What it reads is memory without a name that the
supervisor of the same training filled, and that its workers inherit as a descriptor:
never a file, a checkpoint or a run directory. The memory holds, for each object, its
pickle and then its arrays; every worker maps it, so arrays are there once:

    [ pickle | array | array | ... ][ pickle | array | ... ]
"""

import hashlib
import io
import mmap
import os
import pickle
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import cloudpickle

from samestep.errors import OwnCodeError
from samestep.system import shared_memory
from samestep.system.shared_memory import pages
from samestep.user_code.references import GIVEN


TRACKER_ID = re.compile(rb"\x8c [0-9a-f]{32}")
"""Cloudpickle gives classes random ones; a pickled string of 32 characters."""

HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Of a tensor: what is called with its gradient."""

PLACES = ("__file__", "__firstlineno__")

Extent = tuple[int, int]
"""First byte and length."""


@dataclass(frozen=True)
class PackedObject:
    """One object, ready to go; `name` identifies it in the recipe."""

    name: str
    parts: list[pickle.PickleBuffer]
    """Its pickle and its arrays."""


def pack(value: object, role: str) -> PackedObject:
    """Functions and classes of the main module go by value. Raises OwnCodeError."""
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, buffers.append).dump(value)
        name = GIVEN + identity(value)
    except Exception as error:
        raise OwnCodeError(
            f"The {role} must be something that can be sent to another process; "
            f"{type(value).__name__} cannot be: {error}. Name it as `module:function`, "
            "or build it inside a function."
        ) from error
    return PackedObject(name, [pickle.PickleBuffer(stream.getvalue()), *buffers])


def identity(value: object) -> str:
    """SHA-256 of the code and the data, wherever the code stands in its file."""
    digest, stream = hashlib.sha256(), io.BytesIO()
    _Identity(stream, lambda buffer: digest.update(buffer.raw())).dump(value)
    digest.update(TRACKER_ID.sub(b"", stream.getvalue()))
    return digest.hexdigest()


def fill(parcels: list[PackedObject]) -> tuple[int, dict[str, list[Extent]]]:
    """The descriptor of memory with all parcels, and where their parts are."""
    sizes = [part.raw().nbytes for parcel in parcels for part in parcel.parts]
    starts = list(accumulate(map(pages, sizes), initial=0))
    fd = shared_memory.create()
    remedy = "Give a function that loads the data instead."
    with shared_memory.reserve(
        fd, max(1, starts[-1]), "The data given", remedy
    ) as area:
        index, position = {}, 0
        for parcel in parcels:
            index[parcel.name] = list[Extent]()
            for part in parcel.parts:
                first, size = starts[position], sizes[position]
                area[first : first + size] = part.raw()
                index[parcel.name].append((first, size))
                position += 1
    return fd, index


def unpack(fd: int, extents: list[Extent]) -> Any:
    """In a worker: the object; its arrays are the memory, until somebody writes."""
    area = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_COPY))
    code, *buffers = (area[first : first + size] for first, size in extents)
    return pickle.loads(code, buffers=buffers)  # noqa: S301


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Tensors go as arrays, beside the pickle."""

    def __init__(
        self, stream: io.BytesIO, keep: Callable[[pickle.PickleBuffer], Any]
    ) -> None:
        super().__init__(stream, protocol=5, buffer_callback=lambda b: bool(keep(b)))

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind.__module__.startswith("torch") and kind.__name__ in (
            "Tensor",
            "Parameter",
        ):
            reduced = _reduce_tensor(value)
            if reduced is not None:
                return reduced
        return super().reducer_override(value)


class _Identity(_Pickler):
    """Without the places of functions: file names and lines."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.CodeType):
            fields = (
                *(value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount),
                *(value.co_flags, value.co_code, value.co_consts, value.co_names),
                *(value.co_varnames, value.co_freevars, value.co_cellvars),
            )
            return tuple, (list(fields),)
        reduced = super().reducer_override(value)
        if isinstance(value, types.FunctionType | type) and isinstance(reduced, tuple):
            return _without_place(reduced)
        return reduced


def _without_place(reduced: Any) -> Any:
    """Drops `__file__` and line numbers from the dictionaries of a reduced object."""
    if isinstance(reduced, tuple):
        return tuple(map(_without_place, reduced))
    if isinstance(reduced, dict):
        return {k: v for k, v in reduced.items() if k not in PLACES}
    return reduced


def _reduce_tensor(value: Any) -> Any:
    """None for what numpy cannot hold. Raises ValueError if that has hooks."""
    hooks = [list((getattr(value, name) or {}).values()) for name in HOOKS]
    plain = value.detach()
    try:
        array = plain.contiguous().numpy()
    except (TypeError, RuntimeError):
        if any(hooks):
            raise ValueError(f"hooks of a tensor of {value.dtype} are lost") from None
        return None
    is_parameter = type(value).__name__ == "Parameter"
    reduced = restore_tensor, (array, is_parameter, value.requires_grad)
    # As state: a hook may refer to the tensor, which must be there by then.
    return (*reduced, hooks, None, None, restore_hooks) if any(hooks) else reduced


def restore_tensor(array: Any, is_parameter: bool, requires_grad: bool) -> Any:
    """A tensor or a parameter on the memory of `array`."""
    import torch

    tensor = torch.from_numpy(array)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def restore_hooks(tensor: Any, hooks: list[list[Callable[..., Any]]]) -> None:
    """Registers what `register_hook` and its like had, in their order."""
    before, after = hooks
    for hook in before:
        tensor.register_hook(hook)
    for hook in after:
        tensor.register_post_accumulate_grad_hook(hook)


@dataclass(frozen=True)
class Received:
    """In a worker: the objects that came with the job."""

    fd: int | None
    index: Mapping[str, list[Extent]]

    def __contains__(self, name: object) -> bool:
        return name in self.index

    def __getitem__(self, name: str) -> Any:
        assert self.fd is not None
        return unpack(self.fd, self.index[name])
