"""The optional sections of a recipe: `[init]`, `[ema]` and `[early_stopping]`."""

from typing import Annotated

from pydantic import Field

from samestep.config.model import Count, Measured, NonNegative, Section
from samestep.config.optimizer import Pattern


class EmaRecipe(Section):
    """An exponential moving average of the weights, which is evaluated and kept.

    It begins as the weights after the first step; then, after every step,
    `average = decay * average + (1 - decay) * weights` (Polyak and Juditsky 1992).
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Averages over about 1 / (1 - decay) steps."""


class InitRecipe(Section):
    """Initial weights from a file, with the names and shapes of the model's."""

    weights: Annotated[str, Field(min_length=1)]
    """A `.safetensors` file, a `state_dict` in `.pt` or `.pth`, or a run directory."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the file, since it decides the result; added when training starts."""
    reinit: Annotated[tuple[Pattern, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Regular expressions: parameters to initialize at random, such as a new head."""


class EarlyStoppingRecipe(Section):
    """Ends the training before its length once the validation stops improving.

    The learning-rate schedule still spans all `epochs` or `max_steps`.
    """

    patience: Count = 3
    """Evaluations in a row without an improvement after which training ends."""
    metric: Measured = "validation_loss"
    """The metric to watch: an accuracy should rise, the others fall."""
    min_delta: NonNegative = 0.0
    """Smaller improvements do not count."""
    restore_best: bool = True
    """Whether the result has the weights of the best evaluation, not the last ones."""
