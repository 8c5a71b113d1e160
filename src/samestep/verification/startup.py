"""The check that all workers start a training with the same data and model.

Every worker loads the data and builds the model by itself. Digests of each are compared
in one merge, after the exchange is set up and before parameters are shared or sent:
later, a difference would be hidden, or noticed only after an epoch.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from samestep.config.data import CustomData
from samestep.config.model import CustomModel
from samestep.config.recipe import Recipe
from samestep.core.plan import derive_seed
from samestep.data.dataset import Dataset
from samestep.data.pytree import leaves
from samestep.data.splits import Split
from samestep.errors import (
    CheckpointError,
    DataError,
    OwnCodeError,
    ReplicasDiffer,
    SamestepError,
)
from samestep.exchange import Merger, gather_cells
from samestep.state.fingerprint import fingerprint
from samestep.user_code import seeding


SPLITS = ("train", "validation", "test")
NUM_COMPARED = 5
"""Samples of each split that are compared: the first, the last and some between."""
BYTES = 6
"""Bytes of a SHA-256 that are compared: those that a float64 holds exactly."""
SPLIT_NAMES = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class StartupCheck:
    """One worker's part of the check; all workers make the same calls."""

    recipe: Recipe
    rank: int
    exchange: Merger

    def check_data(self, data: Dataset) -> str:
        """All workers: compare the data; return a SHA-256 of lengths and drawn samples.

        Draws 15 samples. Raises OwnCodeError or DataError, on all workers, if the data
        of one of them differ.
        """
        sizes = [len(data.splits[name]) for name in SPLITS]
        samples = [
            samples_sha256(
                data.splits[name], derive_seed(self.recipe.seed, "alike", name)
            )
            for name in SPLITS
        ]
        cells = [*sizes, *map(_cell, samples)]
        every = gather_cells(self.exchange, self.rank, cells)
        for worker, its in enumerate(every):
            for index, name in enumerate(SPLITS):
                if its[index] != every[0][index]:
                    raise self._data_error(
                        f"The data of worker {worker} have {int(its[index])} "
                        f"{SPLIT_NAMES[name]} samples, those of worker 0 have "
                        f"{int(every[0][index])}"
                    )
                if its[len(SPLITS) + index] != every[0][len(SPLITS) + index]:
                    raise self._data_error(
                        f"Some {SPLIT_NAMES[name]} samples of worker {worker} are not "
                        "those that worker 0 has at the same index"
                    )
        text = " ".join([*map(str, sizes), *samples])
        return hashlib.sha256(text.encode()).hexdigest()

    def check_model(self, model: nn.Module) -> None:
        """All workers: compare the names and values of parameters and buffers.

        Costs a SHA-256 over the model, as every epoch does. Raises OwnCodeError or
        ReplicasDiffer, on all workers.
        """
        # Not the state_dict: buffers that are not in it are compared, too.
        values = dict(model.named_parameters()) | dict(model.named_buffers())
        sums = [fingerprint({name: value}) for name, value in values.items()]
        names = hashlib.sha256("\n".join(values).encode()).hexdigest()
        whole = hashlib.sha256("".join(sums).encode()).hexdigest()
        cells = [_cell(names), _cell(whole)]
        every = gather_cells(self.exchange, self.rank, cells)
        for worker, (its_names, its_values) in enumerate(every):
            if its_names != every[0][0]:
                raise self._model_error(
                    f"The model of worker {worker} has other parameters or buffers "
                    "than that of worker 0"
                )
            if its_values != every[0][1]:
                name = self._first_difference(list(values), sums, worker)
                raise self._model_error(
                    f"`{name}` of the model does not begin in worker {worker} with the "
                    "values that it has in worker 0"
                )

    def _first_difference(self, names: list[str], sums: list[str], worker: int) -> str:
        """All workers: return the first name whose values differ from worker 0."""
        every = gather_cells(self.exchange, self.rank, list(map(_cell, sums)))
        pairs = zip(every[worker], every[0], strict=True)
        return next(n for n, (a, b) in zip(names, pairs, strict=True) if a != b)

    def _data_error(self, difference: str) -> SamestepError:
        if isinstance(self.recipe.data, CustomData):
            return OwnCodeError(
                f"{difference}; `load` must return the same data in every worker. Let "
                "nothing in it depend on the rank, the process or the time."
            )
        return DataError(
            f"{difference}. Give all workers the same files and libraries."
        )

    def _model_error(self, difference: str) -> SamestepError:
        if isinstance(self.recipe.model, CustomModel):
            return OwnCodeError(
                f"{difference}; `build` must return the same model in every worker. "
                "Seed what it draws (`torch.manual_seed`), and let nothing in it "
                "depend on the rank, the process or the time."
            )
        return ReplicasDiffer(
            f"{difference}, though the recipe's seed decides them. Another library or "
            "a fault of the hardware is likely; `samestep doctor` compares machines."
        )


def check_order(digest: str, rank: int, exchange: Merger) -> None:
    """All workers: compare a SHA-256 of the samples to come; empty: they are equal.

    Raises OwnCodeError, on all workers.
    """
    if not digest:
        return
    every = gather_cells(exchange, rank, [_cell(digest)])
    for worker, its in enumerate(every):
        if its != every[0]:
            raise OwnCodeError(
                "All workers read the same samples in the same order, and each keeps "
                f"its micro-batches; worker {worker} has others than worker 0. Do not "
                "divide a stream (no `split_by_node`), and let neither it nor a "
                "sampler depend on the rank, the process or the time."
            )


def conditions(recipe: Recipe, samples: str) -> dict[str, str]:
    """Return the conditions that a run keeps for a resume.

    Files of data have checksums of their own, which the supervisor keeps.
    """
    return {"samples": samples} if isinstance(recipe.data, CustomData) else {}


def check_resumed(kept: str, samples: str) -> None:
    """Raise CheckpointError if the samples are not those that the run began with.

    `kept` is their checksum when the run began, empty if that is not known.
    """
    if kept and kept != samples:
        raise CheckpointError(
            "A run must resume with the data that it began with, and drawn samples "
            f"have another checksum: {kept[:16]} then, {samples[:16]} now. `load` must "
            "return the same samples in the same order whenever it is called: seed "
            "what it draws, and sort what comes from a set. Restore them, or pass "
            "`--allow-different-numerics`."
        )


def samples_sha256(split: Split, seed: int) -> str:
    """Return a SHA-256 of some samples, drawn with seeded generators.

    The generators are left as they were.
    """
    size = len(split)
    if size == 0:
        return hashlib.sha256().hexdigest()
    chosen = sorted(
        {index * (size - 1) // (NUM_COMPARED - 1) for index in range(NUM_COMPARED)}
    )
    with seeding.kept():
        seeding.seed(seed)
        samples = split.gather(torch.tensor(chosen))
    return fingerprint(dict(leaves(samples)))


def _cell(sha256: str) -> int:
    """Return the first BYTES of a digest as a number."""
    return int(sha256[: 2 * BYTES], 16)
