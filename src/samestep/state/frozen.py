"""Frozen parameters and constant buffers, which a training does not change.

They are no part of a snapshot, since every generation of workers builds them again.
Rank 0 writes them once into nameless memory; the supervisor, which has no torch, takes
them from there to complete the files of weights.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from samestep.errors import OwnCodeError


Arrays = Mapping[str, NDArray[np.generic]]


def write(fd: int, tensors: Mapping[str, Any]) -> None:
    """Write torch's tensors by name, on rank 0. Raises OwnCodeError."""
    import safetensors.torch  # imports torch, and the supervisor imports this module

    for name, tensor in tensors.items():
        if not hasattr(np, str(tensor.dtype).removeprefix("torch.")):
            raise OwnCodeError(
                "Frozen parameters and buffers have a type that numpy has, too, so "
                f"that files can be written without torch; `{name}` is {tensor.dtype}. "
                "Keep it in float32 or float16, and convert it in `forward`."
            )
    content = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
    os.ftruncate(fd, 0)
    with open(fd, "wb", closefd=False) as file:
        file.seek(0)
        file.write(content)


def read(fd: int) -> Arrays:
    """Return the arrays by name, in the supervisor, once rank 0 has written them."""
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        content = file.read()
    arrays: Arrays = safetensors.numpy.load(content) if content else {}
    return arrays
