"""How the optimizer of the user's own is made: from the recipe's param groups."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from samestep.config.optimizer import CustomOptimizer
from samestep.config.recipe import Recipe
from samestep.core.plan import derive_seed
from samestep.errors import OwnCodeError
from samestep.optim.kept_state import Kinds
from samestep.optim.param_groups import ParamGroup, groups
from samestep.state.layout import Division, Layout
from samestep.user_code import seeding
from samestep.user_code.references import UserCode, capital, title


Build = Callable[[list[dict[str, Any]]], Any]
"""Makes an optimizer of param groups, as the classes of `torch.optim` take them."""


@dataclass(frozen=True)
class Definition:
    """How a training makes and feeds the optimizer of its recipe."""

    recipe: CustomOptimizer
    build: Build
    who: str
    """What messages call it."""
    seed: int
    layout: Layout
    kinds: Kinds = ()
    """What it keeps for each parameter; known once it was tried."""


def definition(recipe: Recipe, user_code: UserCode, layout: Layout) -> Definition:
    """Return how to make the custom optimizer of a recipe."""
    section = recipe.optimizer
    assert isinstance(section, CustomOptimizer)

    def build(param_groups: list[dict[str, Any]]) -> Any:
        seeding.seed(derive_seed(recipe.seed, "optimizer"))
        return user_code.call(
            section.build,
            "optimizer",
            {"lr": section.lr},
            section.arguments,
            param_groups,
        )

    who = title(section.build, "optimizer")
    return Definition(section, build, who, recipe.seed, layout)


def division(recipe: Recipe) -> Division:
    """Return how workers divide the update.

    With several threads PyTorch divides each operation by itself, at places that depend
    on the size of a tensor and may decide bits.
    """
    section = recipe.optimizer
    if not isinstance(section, CustomOptimizer):
        return "blocks"
    return "aligned" if section.elementwise and recipe.threads == 1 else "none"


def _param_groups(
    made: Definition, parameters: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Return the param groups of the recipe, as `torch.optim` takes them."""
    members: dict[ParamGroup, list[nn.Parameter]] = {}
    for group, parameter in zip(
        groups(made.recipe, made.layout), parameters, strict=True
    ):
        members.setdefault(group, []).append(parameter)
    return [
        {
            "params": each,
            "lr": made.recipe.lr * group.lr_factor,
            "weight_decay": group.weight_decay,
        }
        for group, each in members.items()
    ]


def build_optimizer(
    made: Definition, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the user's optimizer of all parameters. Raises OwnCodeError."""
    given = _param_groups(made, parameters)
    decays = any(group["weight_decay"] for group in given)
    optimizer = made.build(given)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OwnCodeError(
            f"{capital(made.who)} must return a torch.optim.Optimizer; it returned "
            f"{type(optimizer).__name__}."
        )
    try:
        inspect.signature(optimizer.step).bind()
    except TypeError:
        raise OwnCodeError(
            "A step has one gradient, so an optimizer must not need a `closure` that "
            f"computes it again; `step` of {made.who} does."
        ) from None
    held = list(chain(*(group["params"] for group in optimizer.param_groups)))
    if len(held) != len(parameters) or set(held) != set(parameters):
        raise OwnCodeError(
            f"An optimizer updates every parameter that is trained; {made.who} has "
            f"{len(held)} of {len(parameters)}. Freeze the others in the recipe "
            "(`freeze`)."
        )
    if decays and "weight_decay" not in optimizer.defaults:
        raise OwnCodeError(
            f"{capital(made.who)} has no `weight_decay`, and that of the recipe is not "
            "zero: leave it out."
        )
    if any("lr" not in group for group in optimizer.param_groups):
        raise OwnCodeError(
            "Each param group of an optimizer has an `lr`, which the schedule sets; "
            f"one of {made.who} has none."
        )
    return optimizer
