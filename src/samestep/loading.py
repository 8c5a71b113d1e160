"""The network of a run, in this process."""

import copy
from typing import Any

from torch import nn

from samestep import dataset, models, weights
from samestep.asking import recipe_of
from samestep.dataset import Dataset
from samestep.errors import OwnCodeError
from samestep.imports import search_path
from samestep.own import OwnCode, check_origin, names
from samestep.run import Run


def load_model(run: Run, given: Any = None) -> nn.Module:
    """With the final weights, in evaluation mode.

    `given` is a name, or what `samestep.train` was given as model; not needed for a
    built-in one, nor for a function that can be imported. Raises RunError,
    OwnCodeError.
    """
    run.weights_sha256  # noqa: B018  raises where there are no final weights
    recipe, objects = run.recipe, dict[str, Any]()
    if isinstance(given, str):
        recipe = recipe_of(recipe, {"model": given}, {})
    elif given is not None:
        if "model" not in names(recipe):
            raise OwnCodeError(
                f"The model of {run.path} is a built-in one ({recipe.model.family}): "
                "leave out `model`."
            )
        objects = {names(recipe)["model"]: copy.deepcopy(given)}
    if "model" in names(recipe):
        said = {"model": given} if isinstance(given, str) else {}
        check_origin({"model": names(recipe)["model"]}, said, objects)
    facts = run.result.get("data")
    data = Dataset.from_facts(facts) if facts else dataset.load(recipe.data)
    model = models.build(recipe.model, data, OwnCode(search_path(), objects))
    model.load_state_dict(weights.load(run.model_file))
    return model.eval()
