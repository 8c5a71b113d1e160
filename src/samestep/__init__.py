"""Distributed data-parallel training with the same bits at any number of workers.

>>> import samestep
>>> recipe = samestep.Recipe.load("mnist-mlp", {"epochs": 1})
>>> run = samestep.train(recipe, samestep.Placement(workers=2))
>>> print(run.weights_sha256, run.history[-1]["validation_accuracy"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samestep.errors import CheckpointError as CheckpointError
from samestep.errors import DataError as DataError
from samestep.errors import ExportError as ExportError
from samestep.errors import Interrupted as Interrupted
from samestep.errors import NonFiniteGradient as NonFiniteGradient
from samestep.errors import NonFiniteLoss as NonFiniteLoss
from samestep.errors import NotReproducible as NotReproducible
from samestep.errors import OutputError as OutputError
from samestep.errors import OwnCodeError as OwnCodeError
from samestep.errors import PeerLost as PeerLost
from samestep.errors import PlacementError as PlacementError
from samestep.errors import RecipeError as RecipeError
from samestep.errors import ReplicasDiffer as ReplicasDiffer
from samestep.errors import RunError as RunError
from samestep.errors import SamestepError as SamestepError
from samestep.errors import TrainingError as TrainingError
from samestep.errors import UsageError as UsageError
from samestep.errors import WorkerFailed as WorkerFailed
from samestep.errors import WorkerLate as WorkerLate


if TYPE_CHECKING:
    from samestep.api.run import Run as Run
    from samestep.api.train import Evaluation as Evaluation
    from samestep.api.train import evaluate as evaluate
    from samestep.api.train import resume as resume
    from samestep.api.train import train as train
    from samestep.config.placement import Placement as Placement
    from samestep.config.recipe import Recipe as Recipe
    from samestep.loop.loop import Loop as Loop

# Imported on first use: `samestep --help` would otherwise wait 0.3 s for libraries.
_LAZY = {
    "Evaluation": "samestep.api.train",
    "Loop": "samestep.loop.loop",
    "Placement": "samestep.config.placement",
    "Recipe": "samestep.config.recipe",
    "Run": "samestep.api.run",
    "evaluate": "samestep.api.train",
    "resume": "samestep.api.train",
    "train": "samestep.api.train",
}

__all__ = [
    "CheckpointError",
    "DataError",
    "Evaluation",
    "ExportError",
    "Interrupted",
    "Loop",
    "NonFiniteGradient",
    "NonFiniteLoss",
    "NotReproducible",
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
    "evaluate",
    "resume",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module `samestep` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
