"""The section `[schedule]` of a recipe."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from samestep.config.model import (
    Count,
    Dotted,
    Fraction,
    Measured,
    NonNegative,
    Positive,
    Section,
)


class _ScheduleSection(Section):
    depends_on_epochs: ClassVar[bool] = True
    """Whether another number of epochs changes the learning rates of earlier ones."""

    warmup_epochs: NonNegative = 0.0
    """Epochs in which the learning rate first rises linearly to its value."""
    warmup_steps: Count | None = None
    """The same in optimizer steps."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                "a schedule has one warm-up, `warmup_epochs` or `warmup_steps`; "
                f"received {self.warmup_epochs:g} and {self.warmup_steps}: leave out "
                "one of them"
            )
        return self


class _PeriodicSection(_ScheduleSection):
    depends_on_epochs: ClassVar[bool] = False

    every_epochs: Count | None = None
    """Epochs between two changes, or of the first cycle."""
    every_steps: Count | None = None
    """The same in optimizer steps."""

    @model_validator(mode="after")
    def _one_period(self) -> Self:
        if (self.every_epochs is None) == (self.every_steps is None):
            raise ValueError(
                "a periodic schedule has either `schedule.every_epochs` or "
                f"`schedule.every_steps`; received {self.every_epochs} and "
                f"{self.every_steps}"
            )
        return self


class ConstantLR(_ScheduleSection):
    """A constant learning rate."""

    depends_on_epochs: ClassVar[bool] = False

    name: Literal["constant"] = "constant"


class StepLR(_PeriodicSection):
    """A learning rate that is multiplied by `factor` again and again."""

    name: Literal["step"] = "step"
    factor: Positive
    """Factor of each change."""


class CosineLR(_ScheduleSection):
    """A learning rate that falls along half a cosine to `final` times `lr`."""

    name: Literal["cosine"] = "cosine"
    final: NonNegative = 0.0
    """Share of `lr` at the end."""


class LinearLR(_ScheduleSection):
    """A learning rate that falls linearly to `final` times `lr`."""

    name: Literal["linear"] = "linear"
    final: NonNegative = 0.0
    """Share of `lr` at the end."""


class PolynomialLR(_ScheduleSection):
    """A learning rate that falls as a power of the share of steps that are left."""

    name: Literal["polynomial"] = "polynomial"
    power: Positive = 2.0
    """The power; portable arithmetic needs a whole number."""
    final: NonNegative = 0.0
    """Share of `lr` at the end."""


class CosineRestartsLR(_PeriodicSection):
    """Half cosines that begin again with `lr` (SGDR, Loshchilov and Hutter 2017)."""

    name: Literal["cosine-restarts"] = "cosine-restarts"
    growth: Count = 1
    """How many times as long as a cycle the next one is."""
    final: NonNegative = 0.0
    """Share of `lr` at the end of a cycle."""


class PlateauLR(_ScheduleSection):
    """A learning rate that falls whenever the validation stops improving."""

    depends_on_epochs: ClassVar[bool] = False

    name: Literal["plateau"] = "plateau"
    metric: Measured = "validation_loss"
    """The metric to watch: an accuracy should rise, the others fall."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each reduction."""
    patience: Annotated[int, Field(ge=0)] = 10
    """Evaluations in a row without an improvement before the one that reduces it."""
    min_delta: NonNegative = 0.0
    """Smaller improvements do not count."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Evaluations after a reduction that do not count."""
    final: NonNegative = 0.0
    """Least share of `lr`."""


class CustomLR(_ScheduleSection):
    """Your own schedule, a function of the step; see docs/own-code.md."""

    name: Literal["custom"] = "custom"
    function: Dotted
    """`module:function`; or `sha256:...` for an object given in Python."""


class OneCycleLR(_ScheduleSection):
    """A learning rate that rises from `start` to `lr`, then falls to `final`."""

    name: Literal["one-cycle"] = "one-cycle"
    rise: Fraction = 0.3
    """Share of all steps in which the learning rate rises."""
    start: NonNegative = 0.04
    """Share of `lr` at the beginning."""
    final: NonNegative = 0.0001
    """Share of `lr` at the end."""


ScheduleRecipe = Annotated[
    ConstantLR
    | StepLR
    | CosineLR
    | OneCycleLR
    | LinearLR
    | PolynomialLR
    | CosineRestartsLR
    | PlateauLR
    | CustomLR,
    Field(discriminator="name"),
]
