"""Data of the user's own: the side of the supervisor, which does not run their code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from samestep.config.data import CustomData
from samestep.data.sources.source import Source
from samestep.system.json_values import JsonObject
from samestep.user_code.references import UserCode


if TYPE_CHECKING:
    from samestep.data.splits import Samples
    from samestep.data.targets import Labels


@dataclass(frozen=True)
class CustomSource(Source):
    """See `Source`."""

    recipe: CustomData
    may_be_slow = True

    def describe(self) -> JsonObject:
        """Return the function's name."""
        return {"source": "custom", "load": self.recipe.load}

    def load(self, user_code: UserCode, labels: "Labels") -> "Samples":
        """Call the function. Raises OwnCodeError, DataError."""
        from samestep.data.sources import user_dataset

        return user_dataset.load(self.recipe, user_code, labels)
