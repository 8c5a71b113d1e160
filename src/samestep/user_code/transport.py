"""Sends objects that a Python caller gives to `samestep.train` to the workers.

This is the only module that unpickles. It reads anonymous memory that the supervisor of
the same training has filled and whose descriptor the workers inherit, never a file, a
checkpoint or a run directory. The memory holds, for each object, its pickle and then
its arrays. Every worker maps it, so arrays are in memory once:

    [ pickle | array | array | ... ][ pickle | array | ... ]
"""

import hashlib
import io
import mmap
import os
import pickle
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import cloudpickle

from samestep.errors import OwnCodeError
from samestep.system import shared_memory
from samestep.system.shared_memory import pages
from samestep.user_code.references import GIVEN


PROTOCOL = 5
"""The first version of pickle that can keep arrays apart."""
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""A tensor's hooks: functions that are called with its gradient."""
PLACES = ("__file__", "__firstlineno__")
"""Attributes that say where in a file a function or a class is."""

Extents = list[list[int]]
"""The first byte and the length of each part of an object."""


@dataclass(frozen=True)
class PackedObject:
    """A pickled object."""

    name: str
    """`sha256:...`, which stands for it in the recipe."""
    parts: list[pickle.PickleBuffer]
    """Its pickle and its arrays."""


def pack(value: object, role: str) -> PackedObject:
    """Pickle an object, functions and classes of the main module by value.

    Raises OwnCodeError.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = io.BytesIO()
    try:
        _Pickler(stream, PROTOCOL, buffers.append).dump(value)
        name = GIVEN + identity(value)
    except Exception as error:
        raise OwnCodeError(
            f"The {role} must be something that can be sent to another process; "
            f"{type(value).__name__} cannot be: {error}. Name it as `module:function`, "
            "or build it inside a function."
        ) from error
    return PackedObject(name, [pickle.PickleBuffer(stream.getvalue()), *buffers])


def identity(value: object) -> str:
    """Return the SHA-256 of the code and the data, wherever the code is in its file."""
    digest, stream = hashlib.sha256(), io.BytesIO()
    pickler = _IdentityPickler(stream, PROTOCOL, lambda b: digest.update(b.raw()))
    pickler.dump(value)
    content = stream.getvalue()
    for tracker_id in pickler.tracker_ids:
        content = content.replace(_pickled(tracker_id), b"")
    digest.update(content)
    return digest.hexdigest()


def fill(objects: list[PackedObject]) -> tuple[int, dict[str, Extents]]:
    """Copy objects into memory for the workers.

    Returns its descriptor, and where the parts of each object are.
    """
    sizes = [part.raw().nbytes for packed in objects for part in packed.parts]
    starts = list(accumulate(map(pages, sizes), initial=0))
    fd = shared_memory.create()
    remedy = "Give a function that loads the data instead."
    try:
        area = shared_memory.reserve(fd, max(1, starts[-1]), "The data given", remedy)
    except BaseException:
        os.close(fd)
        raise
    with area:
        index, extents = {}, zip(starts, sizes, strict=False)
        for packed in objects:
            index[packed.name] = Extents()
            for part in packed.parts:
                first, size = next(extents)
                area[first : first + size] = part.raw()
                index[packed.name].append([first, size])
    return fd, index


def unpack(fd: int, extents: Extents) -> Any:
    """Unpickle an object in a worker; its arrays are views of the memory.

    A worker that writes to them gets copies of the pages of its own.
    """
    area = memoryview(mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_COPY))
    code, *buffers = (area[first : first + size] for first, size in extents)
    return pickle.loads(code, buffers=buffers)  # noqa: S301


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Keeps arrays, and tensors as arrays, out of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        module, name = type(value).__module__, type(value).__name__
        reduced = None
        if module.startswith("torch") and name in ("Tensor", "Parameter"):
            reduced = _reduce_tensor(value)
        return super().reducer_override(value) if reduced is None else reduced


class _IdentityPickler(_Pickler):
    """Leaves out where functions and classes are: file names and lines."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tracker_ids: list[str] = []
        """Random names that cloudpickle gives to classes."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, types.CodeType):
            fields = [
                value.co_argcount,
                value.co_posonlyargcount,
                value.co_kwonlyargcount,
                value.co_flags,
                value.co_code,
                value.co_consts,
                value.co_names,
                value.co_varnames,
                value.co_freevars,
                value.co_cellvars,
            ]
            return tuple, (fields,)
        if isinstance(value, TypeVar):  # cloudpickle gives these random names, too
            bounds = value.__bound__, value.__constraints__
            variance = value.__covariant__, value.__contravariant__
            return tuple, ([value.__name__, *bounds, *variance],)
        reduced = super().reducer_override(value)
        if isinstance(value, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            # The last but one argument of cloudpickle's `_make_skeleton_class` or
            # `_make_skeleton_enum`.
            self.tracker_ids.append(reduced[1][-2])
        if isinstance(value, types.FunctionType | type) and isinstance(reduced, tuple):
            return _without_place(reduced)
        return reduced


def _pickled(tracker_id: str) -> bytes:
    """Return a string of less than 256 bytes as it is in a pickle."""
    return pickle.SHORT_BINUNICODE + bytes([len(tracker_id)]) + tracker_id.encode()


def _without_place(reduced: Any) -> Any:
    """Drop `__file__` and line numbers from the dictionaries of a reduced object."""
    if isinstance(reduced, tuple):
        return tuple(map(_without_place, reduced))
    if isinstance(reduced, dict):
        return {k: v for k, v in reduced.items() if k not in PLACES}
    return reduced


def _reduce_tensor(value: Any) -> Any:
    """Reduce a tensor to an array; return None if numpy has no such type.

    Raises ValueError if that has hooks.
    """
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
    """Return a tensor or a parameter on the memory of `array`."""
    import torch

    tensor = torch.from_numpy(array)
    if is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.requires_grad_(requires_grad)


def restore_hooks(tensor: Any, hooks: list[list[Callable[..., Any]]]) -> None:
    """Register hooks: those before and those after the gradient is accumulated."""
    before, after = hooks
    for hook in before:
        tensor.register_hook(hook)
    for hook in after:
        tensor.register_post_accumulate_grad_hook(hook)
