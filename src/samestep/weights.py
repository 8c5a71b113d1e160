"""Weights on disk, and the proof that all workers hold the same."""

import json
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from samestep import atomic
from samestep.errors import OutputError, ReplicasDiffer
from samestep.fingerprint import fingerprint
from samestep.recipe import Recipe


def agreed(model: nn.Module, rank: int) -> str:
    """All workers: the fingerprint. Raises ReplicasDiffer, on all, if it is not one."""
    sha256 = fingerprint(model.state_dict())
    workers = dist.get_world_size()
    if workers > 1:
        own = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8)
        every = torch.empty(workers, len(own), dtype=torch.uint8)
        dist.all_gather_single(every.view(-1), own)
        if not bool((every == every[0]).all()):
            raise ReplicasDiffer(
                "All workers must hold the same weights; worker "
                f"{rank} has {sha256[:16]}, another has something else. Memory or a "
                "processor may be faulty, or a library depends on the worker."
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
