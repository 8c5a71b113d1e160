"""The sections `[optimizer]` and `[schedule]` of a recipe."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from samestep.config.model import Count, Fraction, NonNegative, Positive, Section


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"`{pattern}` is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
"""A regular expression that is searched in the names of parameters."""


class ParameterGroup(Section):
    """Parameters with their own learning rate or weight decay: a param group."""

    match: Pattern
    """Regular expression, searched in the names; the first group that matches wins."""
    lr_factor: Positive = 1.0
    """Factor of the learning rate; to train them not at all, `freeze` them."""
    weight_decay: NonNegative | None = None
    """Replaces the optimizer's `weight_decay`."""


class _OptimizerSection(Section):
    lr: Positive
    """Learning rate, which the schedule multiplies."""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient; for adamw, decoupled decay."""
    max_grad_norm: Positive | None = None
    """Scale the gradient down to this global L2 norm if it is larger."""
    decay_norms_and_biases: bool = True
    """Whether `weight_decay` applies to parameters of one dimension, too."""
    groups: Annotated[tuple[ParameterGroup, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Param groups, `[[optimizer.groups]]`."""

    omit_if_default = frozenset({"decay_norms_and_biases"})


class SgdRecipe(_OptimizerSection):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    """Decay rate of the running sum of gradients."""
    nesterov: bool = False
    """Whether to use Nesterov momentum (Nesterov 1983)."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("`nesterov` needs a positive `momentum`")
        return self


class _AdamSection(_OptimizerSection):
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False)
    """Decay rates of the running mean and of the running square."""
    eps: Positive = 1e-8
    """Added to the root of the running square."""


class AdamRecipe(_AdamSection):
    """Adam (Kingma and Ba 2015)."""

    name: Literal["adam"] = "adam"


class AdamWRecipe(_AdamSection):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

    name: Literal["adamw"] = "adamw"


class MuonRecipe(_AdamSection):
    """Muon (Jordan 2024) for hidden matrices, AdamW for all other parameters."""

    name: Literal["muon"] = "muon"
    adamw_lr: Positive = 0.001
    """Learning rate of AdamW, which the schedule multiplies; `lr` is that of Muon."""
    momentum: Fraction = 0.95
    """Momentum of Muon; `betas` and `eps` are those of AdamW."""
    nesterov: bool = True
    """Whether Muon uses Nesterov momentum."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations that orthogonalize an update."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """How the learning rate depends on a matrix's shape: see `samestep.optim.muon`."""
    matrices: Annotated[tuple[Pattern, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Regular expressions: matrices for Muon; by default the hidden ones."""


class _ScheduleSection(Section):
    depends_on_epochs: ClassVar[bool] = True
    """Whether another number of epochs changes the learning rates of earlier ones."""

    warmup_epochs: NonNegative = 0.0
    """Epochs in which the learning rate first rises linearly to its value."""


class ConstantLR(_ScheduleSection):
    """A constant learning rate."""

    depends_on_epochs: ClassVar[bool] = False

    name: Literal["constant"] = "constant"


class StepLR(_ScheduleSection):
    """A learning rate that is multiplied by `factor` every `every_epochs` epochs."""

    depends_on_epochs: ClassVar[bool] = False

    name: Literal["step"] = "step"
    every_epochs: Count
    """Epochs between two changes."""
    factor: Positive
    """Factor of each change."""


class CosineLR(_ScheduleSection):
    """A learning rate that falls along half a cosine to `final` times `lr`."""

    name: Literal["cosine"] = "cosine"
    final: NonNegative = 0.0
    """Share of `lr` at the end."""


class OneCycleLR(_ScheduleSection):
    """A learning rate that rises from `start` to `lr`, then falls to `final`."""

    name: Literal["one-cycle"] = "one-cycle"
    rise: Fraction = 0.3
    """Share of all steps in which the learning rate rises."""
    start: NonNegative = 0.04
    """Share of `lr` at the beginning."""
    final: NonNegative = 0.0001
    """Share of `lr` at the end."""


OptimizerRecipe = Annotated[
    SgdRecipe | AdamRecipe | AdamWRecipe | MuonRecipe, Field(discriminator="name")
]
ScheduleRecipe = Annotated[
    ConstantLR | StepLR | CosineLR | OneCycleLR, Field(discriminator="name")
]
