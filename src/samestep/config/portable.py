"""What portable arithmetic has no kernels for, as far as the configuration shows it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from samestep.config.model import CustomLoss
from samestep.config.optimizer import MuonRecipe
from samestep.errors import PlacementError


if TYPE_CHECKING:
    from samestep.config.recipe import Recipe


def check(recipe: "Recipe") -> None:
    """Raise ValueError, naming every part of a recipe that is not portable."""
    parts = list(_not_portable(recipe))
    if parts:
        raise ValueError(
            f'`arithmetic = "portable"` has no kernels for {"; ".join(parts)}. '
            'Change that, or set `arithmetic = "torch"`'
        )


def check_device(recipe: "Recipe", device: str) -> None:
    """Raise PlacementError if a portable recipe is to be computed on a GPU."""
    if recipe.is_portable and device != "cpu":
        raise PlacementError(
            f"Portable arithmetic computes on the CPU so far, not on `{device}`. Use "
            "`--device cpu`, or train with `--set arithmetic=torch`."
        )


def _not_portable(recipe: "Recipe") -> Iterator[str]:
    if recipe.precision != "float32":
        yield f"`precision = {recipe.precision}` (only for `float32`)"
    if recipe.threads != 1:
        yield (
            f"`threads = {recipe.threads}` (they compute on one thread; use more "
            "`--workers`)"
        )
    if recipe.compile:
        yield "`compile = true` (they are compiled already)"
    if recipe.compression != "none":
        yield f"`compression = {recipe.compression}`"
    if isinstance(recipe.loss, CustomLoss):
        yield "a loss of your own"
    if isinstance(recipe.optimizer, MuonRecipe):
        yield "`optimizer.name = muon` (it multiplies in bfloat16)"
