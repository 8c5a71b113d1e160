"""Distributed data-parallel training with the same bits at any number of workers.

>>> import samestep
>>> recipe = samestep.Recipe.load("mnist-mlp", {"epochs": 1})
>>> run = samestep.train(recipe, samestep.Placement(workers=2))
>>> print(run.weights_sha256, run.history[-1]["validation_accuracy"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samestep.errors import (
    CheckpointError,
    DataError,
    ExportError,
    Interrupted,
    KernelError,
    NonFiniteGradient,
    NonFiniteLoss,
    NotPortable,
    NotReproducible,
    OldNameWarning,
    OutputError,
    OwnCodeError,
    PeerLost,
    PlacementError,
    RecipeError,
    ReplicasDiffer,
    RunError,
    SamestepError,
    TrainingError,
    UsageError,
    WorkerFailed,
    WorkerLate,
    WorkerWrong,
)


if TYPE_CHECKING:
    from samestep.api.audit import Audit, audit
    from samestep.api.evaluate import Evaluation, evaluate
    from samestep.api.find_lr import LrTest, find_lr
    from samestep.api.record import record
    from samestep.api.run import Run
    from samestep.api.train import resume, train
    from samestep.config.placement import Placement
    from samestep.config.recipe import Recipe
    from samestep.loop.loop import Loop

# Imported on first use, since pydantic would slow `samestep --help`, and torch more.
_LAZY = {
    "Audit": "samestep.api.audit",
    "Evaluation": "samestep.api.evaluate",
    "LrTest": "samestep.api.find_lr",
    "Loop": "samestep.loop.loop",
    "Placement": "samestep.config.placement",
    "Recipe": "samestep.config.recipe",
    "Run": "samestep.api.run",
    "audit": "samestep.api.audit",
    "evaluate": "samestep.api.evaluate",
    "find_lr": "samestep.api.find_lr",
    "record": "samestep.api.record",
    "resume": "samestep.api.train",
    "train": "samestep.api.train",
}

__all__ = [
    "Audit",
    "CheckpointError",
    "DataError",
    "Evaluation",
    "ExportError",
    "Interrupted",
    "KernelError",
    "Loop",
    "LrTest",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "NotPortable",
    "NotReproducible",
    "OldNameWarning",
    "OutputError",
    "OwnCodeError",
    "PeerLost",
    "Placement",
    "PlacementError",
    "Recipe",
    "RecipeError",
    "ReplicasDiffer",
    "Run",
    "RunError",
    "SamestepError",
    "TrainingError",
    "UsageError",
    "WorkerFailed",
    "WorkerLate",
    "WorkerWrong",
    "audit",
    "evaluate",
    "find_lr",
    "record",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module `samestep` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
