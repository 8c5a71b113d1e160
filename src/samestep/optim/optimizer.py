"""The optimizer step on a slice of the flat parameter vector.

Most optimizers are elementwise, so a worker can update its own slice and the bits equal
those of the unsliced update: torch's kernels round alike in whole vectors and in what
is left of them (tests/test_flat.py), and its fused ones at multiples of the vector
width (`state.layout` cuts at multiples of BLOCK, groups at those of ALIGNMENT). They
are called directly: a `torch.optim` object imports torch._dynamo, 0.9 s. Muon, LAMB and
Adafactor need whole parameters, which the layout never cuts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from samestep.config.optimizer import (
    AdafactorRecipe,
    AdagradRecipe,
    AdamRecipe,
    AdamWRecipe,
    LambRecipe,
    LionRecipe,
    MuonRecipe,
    OptimizerRecipe,
    RmspropRecipe,
    ScheduleFreeAdamWRecipe,
    SgdRecipe,
)
from samestep.optim import adafactor, lamb, lion, muon, rmsprop, schedule_free
from samestep.optim.param_groups import ParamGroup, Slice
from samestep.optim.step import Step
from samestep.state.hashing import NO_HASHES, StepHashes, hash_of


UPDATES: dict[type[Any], Callable[..., None]] = {
    MuonRecipe: muon.update,
    RmspropRecipe: rmsprop.update,
    AdafactorRecipe: adafactor.update,
    LionRecipe: lion.update,
    LambRecipe: lamb.update,
    ScheduleFreeAdamWRecipe: schedule_free.update,
}
"""Updates of one part of the vectors at a time, all of the same signature."""


def state_names(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """Return the names of the state vectors, each of the parameters' size.

    They are those in the state of torch's optimizers; the momentum of Muon is an
    exponential average, too.
    """
    match recipe:
        case SgdRecipe():
            return ("momentum_buffer",) if recipe.momentum else ()
        case AdagradRecipe():
            return ("sum",)
        case RmspropRecipe():
            return rmsprop.state_names(recipe)
        case AdafactorRecipe():
            return "row_var", "col_var"
        case LionRecipe():
            return ("exp_avg",)
        case ScheduleFreeAdamWRecipe():
            return schedule_free.STATES
    return "exp_avg", "exp_avg_sq"


class Optimizer(Protocol):
    """Updates a slice of the parameters."""

    hashes: StepHashes
    """What this worker adds to the hashes of the last step."""

    def resume(self, rates: Iterable[float], steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored.

        `rates` are the learning rates of these steps, for who needs them.
        """

    def step(self, gradient: Any, lr: float) -> None:
        """Update the parameters with the gradient [n]; kernels also take `Summands`."""


class SliceOptimizer:
    """Update a slice of the parameters in place, with a learning rate for each step."""

    def __init__(
        self,
        recipe: OptimizerRecipe,
        parameters: Tensor,
        states: Sequence[Tensor],
        slices: Sequence[Slice] | None = None,
        place: int | None = None,
    ) -> None:
        """Take the slice's `parameters` [n] and `states`, each [n] and zeroed.

        `slices` divide it by parameter group; by default all of it is one group.
        `place` is where it begins in the vector, None if it is not hashed.
        """
        self.hashes, self._place, self._all = NO_HASHES, place, parameters
        if slices is None:
            slices = [Slice(0, len(parameters), ParamGroup(recipe.weight_decay))]
        states = states[: len(state_names(recipe))]  # others are averages of weights
        groups = dict.fromkeys(part.group for part in slices)
        self._steps = torch.zeros((), device=parameters.device)
        self._squares = 0.0
        self._groups = [
            _GroupOptimizer(recipe, group, parameters, states, slices)
            for group in groups
        ]
        self._sums_rates = isinstance(recipe, ScheduleFreeAdamWRecipe)

    def resume(self, rates: Iterable[float], steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored.

        `rates` are the learning rates of these steps.
        """
        self._steps.fill_(steps)
        for lr in rates if self._sums_rates else ():
            self._squares += lr * lr

    def step(self, gradient: Tensor, lr: float) -> None:
        """Update the parameters with the gradient [n]."""
        self._steps += 1
        self._squares += lr * lr
        share = lr * lr / self._squares if self._squares else 0.0
        before = gradient_hash(gradient, self._place)
        for group in self._groups:
            group.step(gradient, lr, share, self._steps)
        self.hashes = StepHashes(before, slice_hash(self._all, self._place))


def slice_hash(vector: Tensor, place: int | None) -> int:
    """Return the hash of a slice [n] that begins at `place`; 0 if it is not hashed."""
    return 0 if place is None else hash_of(vector.cpu().numpy(), place)


def gradient_hash(gradient: Tensor, place: int | None) -> int:
    """Return the hash of a slice [n] of a gradient, with all zeros as positive ones.

    PyTorch gives them one sign or the other, by the way in which it computes a product.
    """
    return 0 if place is None else slice_hash(gradient + 0.0, place)


class _GroupOptimizer:
    """The slices of one parameter group."""

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
        self._parameters = self._views(parameters)
        self._states = [self._views(state) for state in states]
        if isinstance(recipe, AdagradRecipe):
            for total in self._states[0]:
                total.fill_(recipe.initial_accumulator_value)

    def _views(self, vector: Tensor) -> list[Tensor]:
        """Return the parts of a vector [n], of their shape if they are whole."""
        parts, shape = [vector[part] for part in self._parts], self._group.shape
        if shape is None:
            return parts
        return [part[: math.prod(shape)].view(shape) for part in parts]

    def step(self, gradient: Tensor, lr: float, share: float, steps: Tensor) -> None:
        """Update with the gradient [n] of all slices; `steps` includes this one."""
        gradients = self._views(gradient)
        lr *= self._group.lr_factor
        match self._recipe:
            case SgdRecipe() as recipe:
                self._sgd(recipe, gradients, lr, steps)
            case AdagradRecipe() as recipe:
                self._adagrad(recipe, gradients, lr, steps)
            case AdamRecipe() | AdamWRecipe() as recipe:
                self._adam(recipe, gradients, lr, steps)
            case MuonRecipe() as recipe if self._group.shape is None:
                self._adam(recipe, gradients, lr, steps)
            case recipe:
                step = Step(int(steps.item()), lr, self._group.weight_decay, share)
                vectors = zip(self._parameters, gradients, *self._states, strict=True)
                for weights, part, *states in vectors:
                    UPDATES[type(recipe)](recipe, weights, part, states, step)

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

    def _adagrad(
        self, recipe: AdagradRecipe, gradients: list[Tensor], lr: float, steps: Tensor
    ) -> None:
        torch._fused_adagrad_(
            self._parameters,
            gradients,
            self._states[0],
            [steps] * len(gradients),
            lr=lr,
            lr_decay=recipe.lr_decay,
            weight_decay=self._group.weight_decay,
            eps=recipe.eps,
            maximize=False,
        )

    def _adam(
        self,
        recipe: AdamRecipe | AdamWRecipe | MuonRecipe,
        gradients: list[Tensor],
        lr: float,
        steps: Tensor,
    ) -> None:
        decoupled = not isinstance(recipe, AdamRecipe)
        averages, squares = self._states
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
