"""The optimizer step on a slice of the flat parameter vector.

SGD, Adam and AdamW are elementwise, so a worker can update its own slice and the bits
equal those of the unsliced update, as long as slices are cut at multiples of the vector
width (`samestep.flat` cuts at multiples of BLOCK). The arithmetic is that of torch's
fused kernels, called directly: a `torch.optim` object imports torch._dynamo, 0.9 s.
"""

import torch
from torch import Tensor

from samestep.optimizer_sections import (
    AdamRecipe,
    AdamWRecipe,
    OptimizerRecipe,
    SgdRecipe,
)


def state_names(recipe: OptimizerRecipe) -> tuple[str, ...]:
    """The vectors of state, of the parameters' size, that the optimizer keeps.

    Their names are those in the state of torch's optimizers.
    """
    if isinstance(recipe, SgdRecipe):
        return ("momentum_buffer",) if recipe.momentum else ()
    return "exp_avg", "exp_avg_sq"


class Update:
    """Updates a slice of the parameters in place; a learning rate for each step."""

    def __init__(
        self, recipe: OptimizerRecipe, parameters: Tensor, states: list[Tensor]
    ) -> None:
        """`parameters` and each of the `states` that have names, zeroed: [n]."""
        self._recipe = recipe
        self._parameters = [parameters]
        self._states = [[state] for state in states]
        self._steps = torch.zeros((), dtype=torch.float32)

    def resume(self, steps: int) -> None:
        """Goes on after so many steps; the states are those that they left."""
        self._steps.fill_(steps)

    def step(self, gradient: Tensor, lr: float) -> None:
        """Gradient [n] -> the next parameters."""
        self._steps += 1
        if isinstance(self._recipe, SgdRecipe):
            self._sgd(self._recipe, gradient, lr)
        else:
            self._adam(self._recipe, gradient, lr)

    def _sgd(self, recipe: SgdRecipe, gradient: Tensor, lr: float) -> None:
        torch._fused_sgd_(
            self._parameters,
            [gradient],
            self._states[0] if self._states else [],
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=recipe.nesterov,
            maximize=False,
            is_first_step=self._steps.item() == 1,
        )

    def _adam(
        self, recipe: AdamRecipe | AdamWRecipe, gradient: Tensor, lr: float
    ) -> None:
        decoupled = isinstance(recipe, AdamWRecipe)
        averages, squares = self._states
        (torch._fused_adamw_ if decoupled else torch._fused_adam_)(
            self._parameters,
            [gradient],
            averages,
            squares,
            [],
            [self._steps],
            lr=lr,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            weight_decay=recipe.weight_decay,
            eps=recipe.eps,
            amsgrad=False,
            maximize=False,
        )
