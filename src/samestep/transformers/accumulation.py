"""Global batches between two steps of the optimizer, `gradient_accumulation_steps`."""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import Parameter


class Accumulation:
    """The weighted mean of the gradients and losses of some global batches."""

    def __init__(self) -> None:
        self._gradients: list[Tensor] = []
        self._weight = self._loss = 0.0

    def add(
        self, parameters: Sequence[Parameter], loss: float, weight: float, is_last: bool
    ) -> float:
        """Add what is in `grad`, and the mean loss of a batch.

        With the last batch, set `grad` to the mean and return that of the losses;
        otherwise zero. If no batch has any weight, the mean is zero and NaN.
        """
        if is_last and not self._gradients:
            return loss
        gradients = [p.grad * weight for p in parameters if p.grad is not None]
        if self._gradients:
            pairs = zip(self._gradients, gradients, strict=True)
            gradients = [before.add_(gradient) for before, gradient in pairs]
        self._gradients = gradients
        self._weight += weight
        self._loss += loss * weight if weight else 0.0
        return self._finish(parameters) if is_last else 0.0

    def _finish(self, parameters: Sequence[Parameter]) -> float:
        weight = self._weight
        for parameter, gradient in zip(parameters, self._gradients, strict=True):
            parameter.grad = gradient.div_(weight or 1.0)
        loss = self._loss / weight if weight else math.nan
        self._gradients, self._weight, self._loss = [], 0.0, 0.0
        return loss
