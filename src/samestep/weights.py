"""Weights on disk, and the proof that all workers hold the same."""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
        dist.all_gather_into_tensor(every.view(-1), own)
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
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-") as directory:
            temporary = Path(directory) / path.name
            save_file(state, temporary, metadata)
            temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The model cannot be written to {path}: {error}. Free some space or "
            "choose another `--out`, and train again."
        ) from None


def load(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that `samestep.run.read_recipe` has accepted."""
    return load_file(path)
