"""A model before its first step: initial weights from a file, frozen parameters."""

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


STATE_DICT_KEYS = ("state_dict", "model_state_dict")
"""Where files with more than a state_dict usually keep it."""


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Load initial weights and freeze parameters, as the recipe says.

    Raises RecipeError.
    """
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
            f"At least one parameter must be trained, and `freeze` matches all of "
            f"{listing(names)}. Freeze fewer."
        )
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)


def load(model: nn.Module, init: InitRecipe) -> None:
    """Load initial weights from a file. Raises RecipeError if they do not fit."""
    path, content, _ = pretrained.read(init)
    given = _tensors(path, content)
    expected: dict[str, Tensor] = model.state_dict()
    names = sorted(expected.keys() | given.keys())
    for pattern in init.reinit or ():
        for name in matching(pattern, names, "init.reinit"):
            expected.pop(name, None)
            given.pop(name, None)
    problems = replicas.describe_mismatch(expected, given)
    if problems:
        raise RecipeError(
            f"Initial weights fit the model by name and shape; in {path} are "
            f"{problems}. Parameters to be drawn anew can be named in "
            "`init.reinit`, by regular expressions."
        )
    model.load_state_dict(given, strict=False)


def _tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Read tensors by name, without executing anything in the file."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        value = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    except Exception as error:  # the unpickler raises anything on damaged files
        first = re.split(r"[.\n]", str(error))[0]
        raise RecipeError(
            "`init.weights` is a .safetensors file, or a `state_dict` that torch "
            f"has saved; {path} cannot be read as such: {first}."
        ) from None
    return _state_dict(value, path)


def _state_dict(value: Any, path: Path) -> dict[str, Tensor]:
    """Return the state_dict in a file's value. Raises RecipeError."""
    for key in STATE_DICT_KEYS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in value.values()
    ):
        raise RecipeError(
            f"`init.weights` holds a `state_dict`: tensors by name; {path} holds "
            f"something else ({type(value).__name__})."
        )
    return dict(value)
