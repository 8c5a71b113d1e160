"""The fingerprint of a model's weights."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of a state_dict's entries in its own order.

    For each entry, without separators: the name in UTF-8, the dtype's name (`float32`),
    the shape as decimal numbers joined by commas (`512,784`; empty for a scalar), and
    the raw little-endian bytes in row-major order.
    """
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        digest.update(str(tensor.dtype).removeprefix("torch.").encode())
        digest.update(",".join(map(str, tensor.shape)).encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
