"""The section `[optimizer]` of a recipe."""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from samestep.config.model import (
    Arguments,
    Dotted,
    Fraction,
    NonNegative,
    Positive,
    Section,
)


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
    """L2 penalty added to the gradient with sgd, adam, adagrad and rmsprop; decoupled
    decay with the others."""
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


class AdagradRecipe(_OptimizerSection):
    """Adagrad (Duchi, Hazan and Singer 2011)."""

    name: Literal["adagrad"] = "adagrad"
    lr_decay: NonNegative = 0.0
    """Step t, counted from 1, has the learning rate lr / (1 + (t - 1) lr_decay)."""
    initial_accumulator_value: NonNegative = 0.0
    """What the sums of squares begin with."""
    eps: Positive = 1e-10
    """Added to the root of the sum."""


class RmspropRecipe(_OptimizerSection):
    """RMSprop (Tieleman and Hinton 2012)."""

    name: Literal["rmsprop"] = "rmsprop"
    alpha: Fraction = 0.99
    """Decay rate of the running square."""
    eps: Positive = 1e-8
    """Added to the root of the running square."""
    momentum: Fraction = 0.0
    """Decay rate of the running sum of updates."""
    centered: bool = False
    """Whether to divide by the deviation from the running mean (Graves 2013)."""


class AdafactorRecipe(_OptimizerSection):
    """Adafactor (Shazeer and Stern 2018), as in `torch.optim.Adafactor`."""

    name: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    """At step t, counted from 1, the running squares decay by 1 - t ** beta2_decay."""
    eps1: Positive | None = None
    """Least root of a running square; by default the rounding unit of the dtype."""
    eps2: Positive = 1e-3
    """Least root mean square of a parameter, by which its updates are scaled."""
    d: Annotated[float, Field(ge=1)] = 1.0
    """Updates are clipped to this root mean square."""


class LionRecipe(_OptimizerSection):
    """Lion (Chen et al. 2023)."""

    name: Literal["lion"] = "lion"
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.99), strict=False)
    """Share of the running mean in an update, and its decay rate."""


class LambRecipe(_AdamSection):
    """LAMB (You et al. 2020): Adam with a learning rate for each parameter tensor."""

    name: Literal["lamb"] = "lamb"
    eps: Positive = 1e-6
    """Added to the root of the running square."""


class ScheduleFreeAdamWRecipe(_AdamSection):
    """Schedule-free AdamW (Defazio et al. 2024): its result is an average."""

    name: Literal["schedule-free-adamw"] = "schedule-free-adamw"
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False)
    """Share of the average where gradients are taken; decay of the running square."""


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


class CustomOptimizer(_OptimizerSection):
    """Your own optimizer, which a function returns; see docs/own-code.md."""

    name: Literal["custom"] = "custom"
    build: Dotted
    """`module:function`; or `sha256:...` for an object given in Python."""
    elementwise: bool = False
    """Whether each value's update depends on its own gradient and state only: then
    workers divide it. This is checked."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments for the function."""

    @model_validator(mode="after")
    def _arguments_are_not_fields(self) -> Self:
        for name in ("lr", "weight_decay"):
            if name in self.arguments:
                raise ValueError(
                    f"`{name}` of an optimizer is the field `optimizer.{name}`, not an "
                    f"entry of `optimizer.arguments`; received "
                    f"`{self.arguments[name]}`"
                )
        return self


OptimizerRecipe = Annotated[
    SgdRecipe
    | AdamRecipe
    | AdamWRecipe
    | MuonRecipe
    | AdagradRecipe
    | RmspropRecipe
    | AdafactorRecipe
    | LionRecipe
    | LambRecipe
    | ScheduleFreeAdamWRecipe
    | CustomOptimizer,
    Field(discriminator="name"),
]
