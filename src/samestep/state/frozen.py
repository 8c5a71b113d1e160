"""What a training does not change: frozen parameters and buffers that stay.

They are no part of a snapshot, since every generation of workers builds them again.
Rank 0 writes them once into memory without a name, from which the supervisor completes
the files of weights.
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
    """Rank 0: torch's tensors by name. Replaces what was there. Raises OwnCodeError."""
    import safetensors.torch  # and so torch, which the supervisor does without

    for name, tensor in tensors.items():
        if not hasattr(np, str(tensor.dtype).removeprefix("torch.")):
            raise OwnCodeError(
                "Frozen parameters and buffers have a type that numpy has, too, so "
                f"that files can be written without torch; `{name}` is {tensor.dtype}. "
                "Keep it in float32 or float16, and convert it in `forward`."
            )
    content = safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()})
    os.ftruncate(fd, 0)
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], written)


def read(fd: int) -> Arrays:
    """The supervisor, after rank 0 has started: arrays by name."""
    size = os.fstat(fd).st_size
    content = b""
    while len(content) < size:
        content += os.pread(fd, size - len(content), len(content))
    found: Arrays = safetensors.numpy.load(content) if content else {}
    return found
