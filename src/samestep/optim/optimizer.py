"""The optimizer step on a slice of the flat parameter vector.

SGD, Adam and AdamW are elementwise, so a worker can update its own slice and the bits
equal those of the unsliced update, as long as slices are cut at multiples of the vector
width (`state.layout` cuts at multiples of BLOCK, groups at those of ALIGNMENT). The
arithmetic is that of torch's fused kernels, called directly: a `torch.optim` object
imports torch._dynamo, 0.9 s. Muon needs whole matrices, which the layout never cuts.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samestep.config.optimizer import (
    AdamRecipe,
    AdamWRecipe,
    MuonRecipe,
    OptimizerRecipe,
    SgdRecipe,
)
from samestep.optim import muon
from samestep.optim.param_groups import ParamGroup, Slice


def state_names(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Return the names of the state vectors, each of the parameters' size.

    They are those in the state of torch's optimizers; the momentum of Muon is an
    exponential average, too.
    """
    if isinstance(recipe, SgdRecipe):
        return ("momentum_buffer",) if recipe.momentum else ()
    return "exp_avg", "exp_avg_sq"


class Optimizer(Protocol):
    """Updates a slice of the parameters."""

    def resume(self, steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored."""

    def step(self, gradient: Any, lr: float) -> None:
        """Update the parameters with the gradient [n]; kernels also take `Summands`."""


class SliceOptimizer:
    """Update a slice of the parameters in place, with a learning rate for each step."""

    def __init__(
        self,
        recipe: OptimizerRecipe,
        parameters: Tensor,
        states: Sequence[Tensor],
        slices: Sequence[Slice] = (),
    ) -> None:
        """Take the slice's `parameters` [n] and `states`, each [n] and zeroed.

        `slices` divide it by parameter group; by default all of it is one group.
        """
        whole = Slice(0, len(parameters), ParamGroup(recipe.weight_decay))
        slices = slices or [whole]
        groups = dict.fromkeys(part.group for part in slices)
        self._steps = torch.zeros((), device=parameters.device)
        self._groups = [
            _GroupOptimizer(recipe, group, parameters, states, slices)
            for group in groups
        ]

    def resume(self, steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored."""
        self._steps.fill_(steps)

    def step(self, gradient: Tensor, lr: float) -> None:
        """Update the parameters with the gradient [n]."""
        self._steps += 1
        for group in self._groups:
            group.step(gradient, lr, self._steps)


class _GroupOptimizer:
    """The slices of one parameter group, updated by one call of a kernel."""

    def __init__(
        self,
        recipe: OptimizerRecipe,
        group: ParamGroup,
        parameters: Tensor,
        states: Sequence[Tensor],
        slices: Sequence[Slice],
    ) -> None:
        self._recipe, self._group = recipe, group
        self._parts = [slice(s.first, s.end) for s in slices if s.group == group]
        self._parameters = [parameters[part] for part in self._parts]
        self._states = [[state[part] for part in self._parts] for state in states]

    def step(self, gradient: Tensor, lr: float, steps: Tensor) -> None:
        """Update with the gradient [n] of all slices; `steps` includes this one."""
        gradients = [gradient[part] for part in self._parts]
        lr *= self._group.lr_factor
        if isinstance(self._recipe, SgdRecipe):
            self._sgd(self._recipe, gradients, lr, steps)
        elif isinstance(self._recipe, MuonRecipe) and self._group.shape:
            self._muon(self._recipe, gradients, lr)
        else:
            self._adam(self._recipe, gradients, lr, steps)

    def _sgd(
        self, recipe: SgdRecipe, gradients: list[Tensor], lr: float, steps: Tensor
    ) -> None:
        torch._fused_sgd_(
            self._parameters,
            gradients,
            self._states[0] if recipe.momentum else [],
            weight_decay=self._group.weight_decay,
            momentum=recipe.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=recipe.nesterov,
            maximize=False,
            is_first_step=steps.item() == 1,
        )

    def _muon(self, recipe: MuonRecipe, gradients: list[Tensor], lr: float) -> None:
        shape, size = self._group.shape, math.prod(self._group.shape)
        for vectors in zip(self._parameters, gradients, self._states[0], strict=True):
            weights, gradient, momentum = (v[:size].view(shape) for v in vectors)
            decay = self._group.weight_decay
            muon.update(recipe, weights, gradient, momentum, lr, decay)

    def _adam(
        self,
        recipe: AdamRecipe | AdamWRecipe | MuonRecipe,
        gradients: list[Tensor],
        lr: float,
        steps: Tensor,
    ) -> None:
        decoupled = not isinstance(recipe, AdamRecipe)
        averages, squares = self._states[:2]
        (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
            self._parameters,
            gradients,
            averages,
            squares,
            [],
            [steps] * len(gradients),
            lr=lr,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            weight_decay=self._group.weight_decay,
            eps=recipe.eps,
            amsgrad=False,
            maximize=False,
        )
