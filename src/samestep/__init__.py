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
    from samestep.api import Evaluation as Evaluation
    from samestep.api import evaluate as evaluate
    from samestep.api import resume as resume
    from samestep.api import train as train
    from samestep.loop import Loop as Loop
    from samestep.placement import Placement as Placement
    from samestep.recipe import Recipe as Recipe
    from samestep.run import Run as Run

# Imported on first use: `samestep --help` would otherwise wait 0.3 s for libraries.
_LAZY = {
    "Evaluation": "samestep.api",
    "Loop": "samestep.loop",
    "Placement": "samestep.placement",
    "Recipe": "samestep.recipe",
    "Run": "samestep.run",
    "evaluate": "samestep.api",
    "resume": "samestep.api",
    "train": "samestep.api",
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
