"""Loads the network and the data of a run into this process."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from samestep.config.recipe import Recipe
from samestep.data import dataset
from samestep.data.dataset import Dataset
from samestep.data.sources import source_of
from samestep.errors import OwnCodeError, RunError, SamestepError
from samestep.output.run import RunResult
from samestep.training import components
from samestep.user_code import seeding
from samestep.user_code.arguments import recipe_of
from samestep.user_code.imports import search_path
from samestep.user_code.references import UserCode, check_trusted, names
from samestep.verification import replicas


def load_model(run: RunResult, given: Any = None) -> nn.Module:
    """Return the network with the final weights, in evaluation mode.

    `given` is the name or object that `samestep.train` was given as model; it is not
    needed for a built-in model or an importable function. Raises RunError,
    OwnCodeError.
    """
    run.require_weights()
    recipe, own = _with(run, "model", given)
    with seeding.kept():
        model = _built(run, recipe, own)
    replicas.load_into(model, run.model_file)
    return model.eval()


def _built(run: RunResult, recipe: Recipe, own: UserCode) -> nn.Module:
    """Build the model. Raises RunError if the run's files make that impossible."""
    facts = run.result.get("data")
    try:
        data = Dataset.from_facts(facts) if facts else dataset.of_recipe(recipe)
        return components.new_model(recipe, data, own)
    except SamestepError:
        raise
    except Exception as error:  # of torch, for sizes that are impossible or too large
        raise RunError(f"The model of {run.path} cannot be built: {error}.") from error


def load_data(run: RunResult, given: Any = None) -> Dataset:
    """Return the data, as `load_model` does the model. Also raises DataError."""
    recipe, own = _with(run, "data", given)
    source_of(recipe.data).prepare()
    with seeding.kept():
        return dataset.of_recipe(recipe, own)


def _with(run: RunResult, part: str, given: Any) -> tuple[Recipe, UserCode]:
    """Return the recipe with the given part, and the user code that it needs."""
    recipe, objects = run.recipe, dict[str, Callable[[], Any]]()
    if isinstance(given, str):
        recipe = recipe_of(recipe, {part: given}, {})
    elif given is not None:
        if part not in names(recipe):
            raise OwnCodeError(
                f"The {part} of {run.path} is a built-in one: leave out `{part}`."
            )
        objects = {names(recipe)[part]: partial(copy.deepcopy, given)}
    check_trusted(recipe, {} if given is None else names(recipe), part)
    return recipe, UserCode(search_path(), objects)
