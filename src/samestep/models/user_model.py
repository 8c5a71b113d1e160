"""A user's own model: how it is built, and what it must be."""

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from samestep.config.model import CustomModel
from samestep.data.pytree import Shape
from samestep.data.sources.samples import describe
from samestep.errors import OwnCodeError
from samestep.user_code.references import UserCode, title


TYPE = (
    "Parameters are trained in float32, or in float64 with "
    '`precision = "float64"` in the recipe, which converts them'
)


def build(recipe: CustomModel, inputs: Shape, outputs: int, own: UserCode) -> nn.Module:
    """Return the module that was given, or what the user's function returns.

    Raises OwnCodeError.
    """
    who = title(recipe.build, "model")
    model = own.find(recipe.build, "model")
    if not isinstance(model, nn.Module):
        if not callable(model):
            raise OwnCodeError(f"{who} must be callable; it is {describe(model)}.")
        offered = {"inputs": inputs, "outputs": outputs}
        model = own.call(recipe.build, "model", offered, recipe.arguments)
    if not isinstance(model, nn.Module):
        raise OwnCodeError(
            f"{who} must return a torch.nn.Module; it returned {describe(model)}."
        )
    check_parameters(model, who)
    set_modes(model)
    return model


def set_modes(model: nn.Module) -> None:
    """Put the model into training mode, except modules left in evaluation mode.

    A model that is in evaluation mode as a whole, as libraries return pretrained ones,
    trains as a whole. `train` is called, since a model may keep parts of itself in
    evaluation mode there.
    """
    kept = [m for m in model.modules() if not m.training] if model.training else []
    model.train()
    for module in kept:
        module.training = False


def check_parameters(model: nn.Module, who: str) -> None:
    """Raise OwnCodeError unless there is something to train."""
    named = dict(model.named_parameters())
    lazy = [n for n, p in named.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise OwnCodeError(
            f"Parameters must have their shapes: those of lazy modules of {who} have "
            f"not ({', '.join(lazy)}). Call the model once before you return it."
        )
    trained = {name: p for name, p in named.items() if p.requires_grad}
    if not trained:
        why = "all are frozen (`requires_grad=False`)" if named else "it has none"
        raise OwnCodeError(
            f"A model must have parameters to train, and {who} has not: {why}. Are "
            "its layers attributes of the module, or in an nn.ModuleList?"
        )


def check_types(model: nn.Module, who: str, wanted: torch.dtype, rule: str) -> None:
    """Raise OwnCodeError, with the rule, unless trained parameters are of one type."""
    others = [
        f"{name} ({parameter.dtype})"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.dtype != wanted
    ]
    if others:
        raise OwnCodeError(f"{rule}; of {who} are not: {', '.join(others)}.")
