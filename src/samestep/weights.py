"""Weights on disk, and the proof that all workers hold the same."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from samestep.errors import ReplicasDiffer
from samestep.exchange import Merger
from samestep.fingerprint import fingerprint


def agreed(model: nn.Module, rank: int, exchange: Merger) -> str:
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


def load(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file that `samestep.run.read_recipe` has accepted."""
    return safetensors.torch.load_file(path)
