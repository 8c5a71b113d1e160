"""Weights on disk, and the check that all workers hold the same."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from samestep.errors import ReplicasDiffer, RunError
from samestep.exchange import Merger, gather_cells
from samestep.files import untrusted
from samestep.optim.param_groups import listing
from samestep.state.fingerprint import fingerprint


OWN_CAUSE = (
    "In your own code, state that is hidden from samestep is likely (a counter, a "
    "cache, a generator), or a dependence on the rank: `samestep check` looks for both."
)
BUILT_IN_CAUSE = (
    "The built-in code gives every worker the same, so different libraries or a "
    "fault of memory or processor is likely; `samestep doctor --peer` compares "
    "machines."
)


def common_fingerprint(
    model: nn.Module, rank: int, exchange: Merger, is_own: bool
) -> str:
    """All workers: return the fingerprint of the weights, which must be the same.

    `is_own` is whether the training has user code. Raises ReplicasDiffer, on all
    workers, if the fingerprints differ.
    """
    sha256 = fingerprint(model.state_dict())
    # One byte of the digest in each float64 cell, so that merging is exact.
    every = gather_cells(exchange, rank, list(bytes.fromhex(sha256)))
    digests = [bytes(map(int, row)).hex() for row in every]
    for worker, other in enumerate(digests):
        if other != digests[0]:
            raise ReplicasDiffer(
                f"All workers must hold the same weights; worker 0 has "
                f"{digests[0][:16]}, worker {worker} has {other[:16]}. "
                + (OWN_CAUSE if is_own else BUILT_IN_CAUSE)
            )
    return sha256


def load(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a model file. Raises RunError."""
    try:
        untrusted.check_regular(path)
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"{path} is not a readable model file: {error}.") from None


def load_into(model: nn.Module, path: Path) -> None:
    """Load the weights of a model file into a model. Raises RunError."""
    weights = load(path)
    wrong = describe_mismatch(model.state_dict(), weights)
    if wrong:
        raise RunError(
            f"The weights of a model file are those of its recipe; in {path} are "
            f"{wrong}. It is damaged, or was changed."
        )
    model.load_state_dict(weights)


def describe_mismatch(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> str:
    """Describe in words which given weights do not fit the model; empty if all do."""
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    wrong = {
        "missing": [name for name in expected if name not in given],
        "unknown to the model": [
            name for name in sorted(given) if name not in expected
        ],
        "of other shapes": shapes,
    }
    return "; ".join(
        f"{problem}: {listing(names)}" for problem, names in wrong.items() if names
    )
