"""Weights on disk, and the proof that all workers hold the same."""

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from samestep import atomic
from samestep.errors import OutputError, ReplicasDiffer
from samestep.exchange import Exchange
from samestep.fingerprint import fingerprint
from samestep.recipe import Recipe


def agreed(model: nn.Module, rank: int, exchange: Exchange) -> str:
    """All workers: the fingerprint. Raises ReplicasDiffer, on all, if it is not one."""
    sha256 = fingerprint(model.state_dict())
    every = torch.zeros(exchange.workers, 32, dtype=torch.float64)
    every[rank] = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.float64)
    if not bool((exchange.merge(every) == every[0]).all()):
        raise ReplicasDiffer(
            f"All workers must hold the same weights; worker {rank} has "
            f"{sha256[:16]}, another has something else. Memory or a processor may be "
            "faulty, or a library depends on the worker."
        )
    return sha256


def save(model: nn.Module, recipe: Recipe, path: Path) -> None:
    """Atomically, safetensors with the recipe as metadata. Raises OutputError."""
    # safetensors needs contiguous tensors of their own memory.
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    metadata = {"format": "pt", "recipe": json.dumps(recipe.to_dict())}
    try:
        atomic.write(path, safetensors.torch.save(state, metadata))
    except OSError as error:
        raise OutputError(
            f"The model at {path} cannot be written: {error.strerror}. Free some space "
            "or choose another `--out`, and train again."
        ) from None


def load(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that `samestep.run.read_recipe` has accepted."""
    return safetensors.torch.load_file(path)
