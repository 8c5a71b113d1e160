"""The sections of a recipe that say how the weights change: optimizer and schedule."""

import re
from typing import Annotated, Literal, Self

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
    """Parameters that are updated differently from the others."""

    match: Pattern
    """Regular expression searched in the names; the first group that matches counts."""
    lr_factor: Positive = 1.0
    """Times the learning rate; to keep them as they are, `freeze` them."""
    weight_decay: NonNegative | None = None
    """Instead of the optimizer's."""


class _OptimizerSection(Section):
    lr: Positive
    """Learning rate at factor 1 of the schedule."""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient; for adamw, decoupled decay."""
    max_grad_norm: Positive | None = None
    """Scale the gradient down to this global L2 norm if it is larger."""
    decay_norms_and_biases: bool = True
    """Whether `weight_decay` holds for parameters of one dimension, too."""
    groups: Annotated[tuple[ParameterGroup, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Parameters with other learning rates or decays: `[[optimizer.groups]]`."""

    unsaid = frozenset({"decay_norms_and_biases"})


class SgdRecipe(_OptimizerSection):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Fraction = 0.0
    """Decay rate of the running sum of gradients."""
    nesterov: bool = False
    """Whether the momentum looks one step ahead (Nesterov 1983)."""

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
    """Learning rate of AdamW at factor 1 of the schedule; `lr` is that of Muon."""
    momentum: Fraction = 0.95
    """Of the matrices; `betas` and `eps` are those of AdamW."""
    nesterov: bool = True
    """Whether the momentum looks one step ahead."""
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    adjust_lr: Literal["original", "match_rms_adamw"] = "original"
    """How the learning rate depends on a matrix's shape: see `samestep.optim.muon`."""
    matrices: Annotated[tuple[Pattern, ...], Field(min_length=1)] | None = Field(
        None, strict=False
    )
    """Regular expressions: which ones are for Muon, if not the usual hidden ones."""


class _ScheduleSection(Section):
    warmup_epochs: NonNegative = 0.0
    """The learning rate rises linearly from zero during so many epochs."""


class ConstantLR(_ScheduleSection):
    """The same learning rate throughout."""

    name: Literal["constant"] = "constant"


class StepLR(_ScheduleSection):
    """Multiplied by `factor` after every `every_epochs` epochs."""

    name: Literal["step"] = "step"
    every_epochs: Count
    """Between two changes."""
    factor: Positive
    """Of the learning rate."""


class CosineLR(_ScheduleSection):
    """Down to the share `final` along half a cosine."""

    name: Literal["cosine"] = "cosine"
    final: NonNegative = 0.0
    """Share of `lr` at the end."""


class OneCycleLR(_ScheduleSection):
    """Up from the share `start`, then down to the share `final`."""

    name: Literal["one-cycle"] = "one-cycle"
    rise: Fraction = 0.3
    """The share of all steps in which the learning rate rises."""
    start: NonNegative = 0.04
    """Share of `lr` in the beginning."""
    final: NonNegative = 0.0001
    """Share of `lr` at the end."""


OptimizerRecipe = Annotated[
    SgdRecipe | AdamRecipe | AdamWRecipe | MuonRecipe, Field(discriminator="name")
]
ScheduleRecipe = Annotated[
    ConstantLR | StepLR | CosineLR | OneCycleLR, Field(discriminator="name")
]
