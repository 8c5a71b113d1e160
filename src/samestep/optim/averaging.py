"""Weights beside those that are trained: their moving average, and the best so far.

Each is one more state vector: sliced, saved and restored like the optimizer's. To be
evaluated, a vector changes places with the parameters, each worker swapping its slice;
BatchNorm's statistics stay those of the training (with the best weights, those of the
best epoch).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from samestep.config.recipe import Recipe
from samestep.core.early_stopping import Stopping
from samestep.exchange import Exchange
from samestep.state.flat import Flat
from samestep.state.layout import AVERAGE, BEST


def vectors(recipe: Recipe) -> tuple[str, ...]:
    """The names of those that a recipe asks for."""
    average = (AVERAGE,) if recipe.ema else ()
    stopping = recipe.early_stopping
    return average + ((BEST,) if stopping and stopping.restore_best else ())


class WeightAverages:
    """This worker's slices of them."""

    def __init__(self, recipe: Recipe, flat: Flat, exchange: Exchange) -> None:
        """The states of the exchange are those of the layout."""
        self._flat, self._exchange = flat, exchange
        self._decay = recipe.ema.decay if recipe.ema else 0.0
        self._parameters = exchange.parameters[slice(*exchange.owned)]
        own = dict(zip(flat.layout.states, exchange.states, strict=True))
        self._average, self._best = own.get(AVERAGE), own.get(BEST)
        self._best_buffers = torch.zeros(
            flat.tail if self._best is not None else 0,
            dtype=flat.dtype,
            device=flat.device,
        )

    def advance(self, step: int) -> None:
        """After the update of a step, counted from 0."""
        if self._average is not None:
            weight = 1.0 if step == 0 else 1 - self._decay
            self._average.lerp_(self._parameters, weight)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """All workers: inside, the model has the weights that are to be evaluated."""
        self._swap(self._average)
        yield  # an exception ends the worker: nothing is to be put right
        self._swap(self._average)

    def keep(self, stopping: Stopping) -> None:
        """Inside `shown`: these are the best so far."""
        if self._best is not None:
            self._best.copy_(self._parameters)
            self._best_buffers = self._flat.saved_buffers()
            stopping.counts = list(self._flat.counts)

    def finish(self, stopping: Stopping) -> None:
        """All workers: the model has the weights of the result, for good."""
        if self._best is None:
            self._swap(self._average)
        else:
            self._flat.set_buffers(self._best_buffers, stopping.counts)
            self._swap(self._best)

    def buffers(self) -> Tensor:
        """What a snapshot holds, [kept_tail]: the model's, then those of the best."""
        return torch.cat([self._flat.saved_buffers(), self._best_buffers])

    def set_buffers(self, values: Tensor, counts: list[int]) -> None:
        """The inverse; `counts` are the model's integer buffers."""
        own, best = torch.split(values, [self._flat.tail, len(self._best_buffers)])
        self._flat.set_buffers(own, counts)
        self._best_buffers = best.to(self._flat.device, copy=True)

    def _swap(self, vector: Tensor | None) -> None:
        """All workers, while nobody uses the model."""
        if vector is None:
            return
        trained = self._parameters.clone()
        self._parameters.copy_(vector)
        vector.copy_(trained)
        self._exchange.all_gather_parameters()
