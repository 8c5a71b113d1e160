"""The optimizer of a recipe: torch's own, in its fused form."""

from collections.abc import Iterable

from torch import nn, optim

from samestep.recipe import AdamRecipe, AdamWRecipe, OptimizerRecipe, SgdRecipe


def build(
    recipe: OptimizerRecipe, parameters: Iterable[nn.Parameter]
) -> optim.Optimizer:
    """The learning rate is set anew before every step (`samestep.schedule`)."""
    match recipe:
        case SgdRecipe():
            return optim.SGD(
                parameters,
                recipe.lr,
                recipe.momentum,
                weight_decay=recipe.weight_decay,
                nesterov=recipe.nesterov,
                fused=True,
            )
        case AdamRecipe():
            kind: type[optim.Adam] = optim.Adam
        case AdamWRecipe():
            kind = optim.AdamW
    return kind(
        parameters,
        recipe.lr,
        recipe.betas,
        recipe.eps,
        recipe.weight_decay,
        fused=True,
    )
