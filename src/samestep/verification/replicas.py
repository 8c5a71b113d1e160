"""Weights on disk, and the proof that all workers hold the same."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from samestep.errors import ReplicasDiffer, RunError
from samestep.exchange import Merger
from samestep.optim.param_groups import listing
from samestep.state.fingerprint import fingerprint
from samestep.system import untrusted_files


OWN_CAUSE = (
    "With code of your own, state that is hidden from samestep is likely (a counter, a "
    "cache, a generator), or code that depends on the rank: `samestep check` looks for "
    "it."
)
BUILT_IN_CAUSE = (
    "The built-in code gives every worker the same, so a library that differs or a "
    "fault of memory or processor is likely; `samestep doctor --peer` compares two."
)


def agreed(model: nn.Module, rank: int, exchange: Merger, is_own: bool) -> str:
    """All workers: the fingerprint. Raises ReplicasDiffer, on all, if it is not one.

    `is_own` says whether the training has code of the user's.
    """
    sha256 = fingerprint(model.state_dict())
    every = torch.zeros(exchange.workers, 32, dtype=torch.float64)
    every[rank] = torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.float64)
    found = [bytes(map(int, row)).hex() for row in exchange.merge(every).tolist()]
    for worker, other in enumerate(found):
        if other != found[0]:
            raise ReplicasDiffer(
                f"All workers must hold the same weights; worker 0 has "
                f"{found[0][:16]}, worker {worker} has {other[:16]}. "
                + (OWN_CAUSE if is_own else BUILT_IN_CAUSE)
            )
    return sha256


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file. Raises RunError."""
    try:
        untrusted_files.check_regular(path)
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path} is not a readable model file: {error}.") from None


def fill(model: nn.Module, path: Path) -> None:
    """The weights of a model file, in place. Raises RunError."""
    found = load(path)
    if wrong := misfit(model.state_dict(), found):
        raise RunError(
            f"The weights of a model file are those of its recipe; in {path} are "
            f"{wrong}. It is damaged, or was changed."
        )
    model.load_state_dict(found)


def misfit(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What of given weights is not of the model, in words; empty if all fits."""
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong = {
        "missing": [name for name in own if name not in given],
        "unknown to the model": [name for name in sorted(given) if name not in own],
        "of other shapes": shapes,
    }
    return "; ".join(
        f"{what}: {listing(names)}" for what, names in wrong.items() if names
    )
