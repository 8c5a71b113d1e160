"""What all workers must have alike when a training starts: its data and its model.

Every worker loads the data and builds the model by itself. What it has is compared in
one merge of a few numbers, after the exchange is there and before parameters are shared
or sent: later, a difference would be hidden, or noticed only after an epoch.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from samestep.exchange import Merger
from samestep.state.fingerprint import fingerprint
from samestep.user_code import seeding


SPLITS = ("train", "validation", "test")
DRAWN = 5
"""Samples of each split that are compared: the first, the last and some between."""
BYTES = 6
"""How much of a SHA-256 is compared: as many bytes as a float64 holds exactly."""
KINDS = {"train": "training", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class Check:
    """One worker's part; all workers make the same calls."""

    recipe: Recipe
    rank: int
    exchange: Merger

    def data(self, data: Dataset) -> str:
        """SHA-256 of drawn samples and of the splits' lengths.

        Costs the drawing of 15 samples. Raises OwnCodeError or DataError, alike on all
        workers, if the data of one of them differ.
        """
        sizes = [len(data.splits[name]) for name in SPLITS]
        samples = [
            drawn(data.splits[name], derive_seed(self.recipe.seed, "alike", name))
            for name in SPLITS
        ]
        every = self._merged([*map(float, sizes), *map(_cell, samples)])
        for worker, found in enumerate(every):
            for index, name in enumerate(SPLITS):
                if found[index] != every[0][index]:
                    raise self._of_data(
                        f"The data of worker {worker} have {int(found[index])} "
                        f"{KINDS[name]} samples, those of worker 0 have "
                        f"{int(every[0][index])}"
                    )
                if found[len(SPLITS) + index] != every[0][len(SPLITS) + index]:
                    raise self._of_data(
                        f"Some {KINDS[name]} samples of worker {worker} are not those "
                        "that worker 0 has at the same index"
                    )
        text = " ".join([*map(str, sizes), *samples])
        return hashlib.sha256(text.encode()).hexdigest()

    def model(self, model: nn.Module) -> None:
        """Raises OwnCodeError or ReplicasDiffer, alike on all workers.

        Costs a SHA-256 over the model, as every epoch does.
        """
        values = _values(model)
        sums = [fingerprint({name: value}) for name, value in values.items()]
        names = hashlib.sha256("\n".join(values).encode()).hexdigest()
        whole = hashlib.sha256("".join(sums).encode()).hexdigest()
        every = self._merged([_cell(names), _cell(whole)])
        for worker, (its_names, its_values) in enumerate(every):
            if its_names != every[0][0]:
                raise self._of_model(
                    f"The model of worker {worker} has other parameters or buffers "
                    "than that of worker 0"
                )
            if its_values != every[0][1]:
                name = self._first_difference(list(values), sums, worker)
                raise self._of_model(
                    f"`{name}` of the model does not begin in worker {worker} with the "
                    "values that it has in worker 0"
                )

    def _first_difference(self, names: list[str], sums: list[str], worker: int) -> str:
        every = self._merged(list(map(_cell, sums)))
        pairs = zip(every[worker], every[0], strict=True)
        return next(n for n, (a, b) in zip(names, pairs, strict=True) if a != b)

    def _merged(self, cells: list[float]) -> list[list[float]]:
        """[workers, cells]: what each worker has."""
        every = torch.zeros(self.exchange.workers, len(cells), dtype=torch.float64)
        every[self.rank] = torch.tensor(cells, dtype=torch.float64)
        merged: list[list[float]] = self.exchange.merge(every).tolist()
        return merged

    def _of_data(self, what: str) -> SamestepError:
        if isinstance(self.recipe.data, CustomData):
            return OwnCodeError(
                f"{what}; `load` must return the same data in every worker. Let "
                "nothing in it depend on the rank, the process or the time."
            )
        return DataError(f"{what}. Give all workers the same files and libraries.")

    def _of_model(self, what: str) -> SamestepError:
        if isinstance(self.recipe.model, CustomModel):
            return OwnCodeError(
                f"{what}; `build` must return the same model in every worker. Seed "
                "what it draws (`torch.manual_seed`), and let nothing in it depend on "
                "the rank, the process or the time."
            )
        return ReplicasDiffer(
            f"{what}, though the recipe's seed decides them. Another library or a "
            "fault of the hardware is likely; compare machines with `samestep doctor`."
        )


def conditions(recipe: Recipe, samples: str) -> dict[str, str]:
    """What a run keeps of this to go on; files of data have checksums of their own."""
    return {"samples": samples} if isinstance(recipe.data, CustomData) else {}


def check_kept(kept: str, samples: str) -> None:
    """Raises CheckpointError if `load` returned other samples when the run began.

    `kept` is empty where that is not known.
    """
    if kept and kept != samples:
        raise CheckpointError(
            "A run goes on only with the data that it began with, and drawn samples "
            f"have another checksum: {kept[:16]} then, {samples[:16]} now. `load` must "
            "return the same samples in the same order whenever it is called: seed "
            "what it draws, and sort what comes from a set. Restore them, or pass "
            "`--allow-different-numerics`."
        )


def drawn(split: Split, seed: int) -> str:
    """SHA-256 of some samples, whose own randomness is seeded."""
    size = len(split)
    if size == 0:
        return hashlib.sha256().hexdigest()
    chosen = sorted({index * (size - 1) // (DRAWN - 1) for index in range(DRAWN)})
    with seeding.kept():
        seeding.seed(seed)
        samples = split.gather(torch.tensor(chosen))
    return fingerprint(dict(leaves(samples)))


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _cell(sha256: str) -> float:
    return float(int(sha256[: 2 * BYTES], 16))
