"""A model before its first step: given weights, and what of it is trained."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from samestep.config.recipe import Recipe
from samestep.config.training import InitRecipe
from samestep.errors import RecipeError
from samestep.optim.param_groups import listing, matching
from samestep.state import pretrained
from samestep.verification import replicas


WITHIN = ("state_dict", "model_state_dict")
"""Where files with more than a state_dict usually have it."""


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """In place. Raises RecipeError."""
    if recipe.init is not None:
        load(model, recipe.init)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    frozen = {
        name
        for pattern in recipe.freeze or ()
        for name in matching(pattern, names, "freeze")
    }
    if frozen and len(frozen) == len(names):
        raise RecipeError(
            f"Something must be trained, and `freeze` leaves nothing of "
            f"{listing(names)}. Name fewer of them."
        )
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def load(model: nn.Module, init: InitRecipe) -> None:
    """Given weights, in place of those drawn. Raises RecipeError."""
    path, content = pretrained.read(init)
    given = _tensors(path, content)
    own: dict[str, Tensor] = model.state_dict()
    names = sorted(own.keys() | given.keys())
    for pattern in init.reinit or ():
        for name in matching(pattern, names, "init.reinit"):
            own.pop(name, None), given.pop(name, None)
    _check_fit(own, given, path)
    model.load_state_dict(given, strict=False)


def _check_fit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path
) -> None:
    told = replicas.misfit(own, given)
    if told:
        raise RecipeError(
            f"Initial weights fit the model by name and shape; in {path} are "
            f"{told}. Parameters to be drawn anew can be named in `init.reinit`, by "
            "regular expressions."
        )


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        found = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on damaged files
        first = re.split(r"[.\n]", str(error))[0]
        raise RecipeError(
            "`init.weights` is a .safetensors file, or a `state_dict` that torch "
            f"has saved; {path} cannot be read as such: {first}."
        ) from None
    return _state_dict(found, path)


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for key in WITHIN:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise RecipeError(
            f"`init.weights` holds a `state_dict`: tensors by name; {path} holds "
            f"something else ({type(found).__name__})."
        )
    return dict(found)
