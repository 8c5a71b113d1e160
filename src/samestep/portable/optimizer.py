"""The optimizer step by portable kernels, on a slice of the flat parameter vector."""

import ctypes
import math
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor

from samestep.config.optimizer import (
    AdamRecipe,
    AdamWRecipe,
    OptimizerRecipe,
    SgdRecipe,
)
from samestep.core.lr_schedule import power
from samestep.exchange import Summands
from samestep.kernels.interface import Hashes, Kernels, Optimizer, OptimizerKind
from samestep.optim.optimizer import state_names
from samestep.optim.param_groups import ParamGroup, Slice
from samestep.portable.deferred import DeferredWeights
from samestep.state.hashing import KEYS, NO_HASHES, StepHashes


class PortableOptimizer:
    """Update a slice of the parameters in place, with a learning rate for each step.

    It has the methods of `optim.optimizer.SliceOptimizer`.
    """

    def __init__(
        self,
        kernels: Kernels,
        recipe: OptimizerRecipe,
        parameters: Tensor,
        states: Sequence[Tensor],
        slices: Sequence[Slice],
        weights: DeferredWeights | None = None,
        place: int | None = None,
    ) -> None:
        """Take the slice's `parameters` [n] and `states`, each [n] and zeroed.

        `weights` has the gradients of matrices in steps whose summands lack them.
        `place` is where the slice begins in the vector, None if it is not hashed.
        """
        self.hashes, self._place = NO_HASHES, place or 0
        self._sums = Hashes(keys=KEYS.ctypes.data)
        self._address = None if place is None else ctypes.addressof(self._sums)
        self._weights = weights
        self._recipe, self._update, self._steps = recipe, kernels.update, 0
        states = states[: len(state_names(recipe))]  # others are averages of weights
        self._parts = [
            (
                part,
                parameters[part.first :].data_ptr(),
                _both([state[part.first :].data_ptr() for state in states]),
            )
            for part in slices
        ]
        self._kept = parameters, states  # the addresses are theirs
        self._bind(Summands([parameters], [0]))

    def resume(self, rates: Iterable[float], steps: int) -> None:
        """Go on after `steps` steps, whose states have been restored."""
        self._steps = steps

    def step(self, gradient: Tensor | Summands, lr: float) -> None:
        """Update the parameters with the gradient [n], or with the sum of partials."""
        self._steps += 1
        self._sums.gradient = self._sums.parameters = 0
        self._step(gradient, lr)
        self.hashes = StepHashes(self._sums.gradient, self._sums.parameters)

    def _step(self, gradient: Tensor | Summands, lr: float) -> None:
        if self._weights is not None and self._weights.is_due:
            assert isinstance(gradient, Summands)
            ways = partial(self._numbers, lr)
            self._weights.update(gradient, ways, self._address)
            return
        if isinstance(gradient, Tensor):
            gradient = Summands([gradient], [0])
        if gradient is not self._summands:
            self._bind(gradient)
        for (part, parameters, states), leaves in zip(
            self._parts, self._leaves, strict=True
        ):
            how = self._numbers(lr, part.group)
            self._update(
                ctypes.addressof(how),
                ctypes.addressof(leaves),
                ctypes.addressof(self._order),
                len(self._order),
                parameters,
                *states,
                self._place + part.first,
                part.end - part.first,
                self._address,
            )

    def _numbers(self, lr: float, group: ParamGroup) -> Optimizer:
        return numbers(self._recipe, group, lr, self._steps)

    def _bind(self, summands: Summands) -> None:
        """Prepare the kernels' arguments for these summands, which seldom change."""
        order, starts = summands.order, [leaf.data_ptr() for leaf in summands.leaves]
        self._summands = summands
        self._order = (ctypes.c_int32 * len(order))(*order)
        self._leaves = [
            (ctypes.c_void_p * len(starts))(*(s + 4 * part.first for s in starts))
            for part, _, _ in self._parts
        ]


def _both(states: Sequence[int]) -> tuple[int | None, int | None]:
    """Return the addresses of two states; None is for one that an optimizer lacks."""
    first, second = (*states, None, None)[:2]
    return first, second


def numbers(
    recipe: OptimizerRecipe,
    group: ParamGroup,
    lr: float,
    steps: int,
) -> Optimizer:
    """Return the numbers of an update, computed in double.

    `steps` includes this one.
    """
    assert isinstance(recipe, SgdRecipe | AdamRecipe | AdamWRecipe)
    lr *= group.lr_factor
    if isinstance(recipe, SgdRecipe):
        return Optimizer(
            kind=OptimizerKind.SGD,
            nesterov=recipe.nesterov,
            is_first=steps == 1,
            lr=lr,
            weight_decay=group.weight_decay,
            beta1=recipe.momentum,
        )
    beta1, beta2 = recipe.betas
    is_decoupled = isinstance(recipe, AdamWRecipe)
    decay = group.weight_decay
    return Optimizer(
        kind=OptimizerKind.ADAMW if is_decoupled else OptimizerKind.ADAM,
        lr=lr / (1 - power(beta1, steps)),
        weight_decay=1 - lr * decay if is_decoupled else decay,
        beta1=beta1,
        beta2=beta2,
        one_minus_beta1=1 - beta1,
        one_minus_beta2=1 - beta2,
        root=1 / math.sqrt(1 - power(beta2, steps)),
        eps=recipe.eps,
    )
