"""RMSprop: divide by the root of a running square (Tieleman and Hinton 2012).

With the gradient `g`, the running square `s` and mean `a`, and momentum `b`:

    s = alpha * s + (1 - alpha) * g^2
    a = alpha * a + (1 - alpha) * g             if `centered` (Graves 2013)
    u = g / (sqrt(s - a^2) + eps)               without a^2 if not `centered`
    b = momentum * b + u                        if there is momentum, otherwise u
    w = w - lr * b

The operations are those of `torch.optim.RMSprop`, in its order.
"""

from collections.abc import Sequence

from torch import Tensor

from samestep.config.optimizer import RmspropRecipe
from samestep.optim.step import Step


def state_names(recipe: RmspropRecipe) -> tuple[str, ...]:
    """Return the names of the states, as torch has them."""
    momentum = ("momentum_buffer",) if recipe.momentum else ()
    return ("square_avg", *momentum, *(("grad_avg",) if recipe.centered else ()))


def update(
    recipe: RmspropRecipe,
    weights: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    step: Step,
) -> None:
    """Update weights and states in place; all tensors [n]."""
    of = dict(zip(state_names(recipe), states, strict=True))
    if step.weight_decay:
        gradient = gradient.add(weights, alpha=step.weight_decay)
    square = of["square_avg"]
    square.mul_(recipe.alpha).addcmul_(gradient, gradient, value=1 - recipe.alpha)
    if recipe.centered:
        mean = of["grad_avg"].lerp_(gradient, 1 - recipe.alpha)
        square = square.addcmul(mean, mean, value=-1)
    root = square.sqrt().add_(recipe.eps)
    if recipe.momentum:
        buffer = of["momentum_buffer"].mul_(recipe.momentum).addcdiv_(gradient, root)
        weights.add_(buffer, alpha=-step.lr)
    else:
        weights.addcdiv_(gradient, root, value=-step.lr)
