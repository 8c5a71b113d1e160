"""The optional sections of a recipe: what surrounds the plain training.

None of them is there unless it is written.
"""

from typing import Annotated, Literal

from pydantic import Field

from samestep.config.model import Count, NonNegative, Section
from samestep.config.optimizer import Pattern


class EmaRecipe(Section):
    """An exponential moving average of the weights, which is evaluated and kept.

    It begins as the weights after the first step; then, after every step,
    `average = decay * average + (1 - decay) * weights` (Polyak and Juditsky 1992).
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """It looks back about 1 / (1 - decay) steps."""


class InitRecipe(Section):
    """The weights before the first step, from a file; their names and shapes fit."""

    weights: Annotated[str, Field(min_length=1)]
    """`.safetensors`, a `state_dict` in `.pt` or `.pth`, or a run's directory."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the file, which decides the result; added when the training starts."""
    reinit: Annotated[tuple[Pattern, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Regular expressions: what matches is not taken from the file, such as a head."""


Measured = Literal[
    "validation_loss", "validation_accuracy", "validation_absolute_error"
]


class EarlyStoppingRecipe(Section):
    """Early stopping: an end before `epochs` once the validation stops improving.

    The schedule stays laid out over all `epochs`.
    """

    patience: Count = 3
    """Epochs in a row without an improvement after which the training ends."""
    metric: Measured = "validation_loss"
    """What is to improve: an accuracy upwards, all else downwards."""
    min_delta: NonNegative = 0.0
    """A smaller improvement counts as none."""
    restore_best: bool = True
    """Whether the result are the weights of the best epoch rather than the last."""
