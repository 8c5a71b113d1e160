"""What portable arithmetic has no kernels for, as far as the configuration shows it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from samestep.config.schedule import CustomLR
from samestep.errors import PlacementError


if TYPE_CHECKING:
    from samestep.config.recipe import Recipe


OPTIMIZERS = ("sgd", "adam", "adamw")
"""Those that have kernels."""


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
    power = getattr(recipe.schedule, "power", 1.0)
    if not power.is_integer():
        yield f"`schedule.power = {power}` (only for whole numbers)"
    if recipe.optimizer.name not in OPTIMIZERS:
        known = ", ".join(OPTIMIZERS)
        yield f"`optimizer.name = {recipe.optimizer.name}` (only for {known})"
    if isinstance(recipe.schedule, CustomLR):
        yield "`schedule.name = custom` (Python computes it with the C library)"
