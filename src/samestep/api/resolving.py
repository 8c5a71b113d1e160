"""What comes before every training: its parts are found, and its data is ready."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from samestep.config import portable
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.data.sources import source_of
from samestep.state import pretrained
from samestep.system.machine import Gpus
from samestep.user_code.references import check_trusted


class Resolved(NamedTuple):
    """A recipe and a placement with nothing left open."""

    recipe: Recipe
    placement: Placement
    why: str
    """The reason for the number of workers and the exchange, in words."""
    notice: str | None
    """What the data source has to say."""


def resolved(
    recipe: Recipe,
    placement: Placement,
    names: Mapping[str, str],
    gpus: Callable[[], Gpus],
) -> Resolved:
    """Find the initial weights, choose the workers, and unpack the data.

    `names` are the references to code that the caller has given. Raises UsageError.
    """
    check_trusted(recipe, names)
    recipe = pretrained.resolved(recipe)
    placement, why = placement.resolve(recipe.micro_batches, gpus)
    portable.check_device(recipe, placement.device)
    return Resolved(recipe, placement, why, source_of(recipe.data).prepare())
