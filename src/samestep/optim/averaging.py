"""Weights beside those that are trained: their moving average, and the best so far.

Each is one more state vector: sliced, saved and restored like those of the optimizer.
To evaluate it, each worker swaps its slice of it with that of the parameters.
BatchNorm's statistics stay those of the training; with the best weights, they are those
of the best epoch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from samestep.config.recipe import Recipe
from samestep.core.progress import Stopping
from samestep.exchange import Exchange
from samestep.state.flat import Flat
from samestep.state.layout import AVERAGE, BEST


def vectors(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the vectors that a recipe asks for besides its optimizer."""
    average = (AVERAGE,) if recipe.ema else ()
    stopping = recipe.early_stopping
    return average + ((BEST,) if stopping and stopping.restore_best else ())


class WeightAverages:
    """This worker's slices of the averaged and the best weights."""

    def __init__(
        self,
        recipe: Recipe,
        flat: Flat,
        exchange: Exchange,
        move: Callable[[Tensor, Tensor, float], object] = Tensor.lerp_,
    ) -> None:
        """Find the vectors among the states of the exchange, by their names.

        `move(average, parameters, weight)` moves an average towards the parameters.
        """
        self._move = move
        self._flat, self._exchange = flat, exchange
        self._decay = recipe.ema.decay if recipe.ema else None
        self._parameters = exchange.parameters[slice(*exchange.owned)]
        states = dict(zip(flat.layout.states, exchange.states, strict=True))
        self._average, self._best = states.get(AVERAGE), states.get(BEST)
        self._best_buffers = torch.zeros(
            flat.tail if self._best is not None else 0,
            dtype=flat.dtype,
            device=flat.device,
        )

    def advance(self, step: int) -> None:
        """Average in the parameters after the update of a step, counted from 0.

        A schedule-free optimizer has done so itself.
        """
        if self._average is not None and self._decay is not None:
            # The first step sets the average, as torch's AveragedModel does.
            weight = 1.0 if step == 0 else 1 - self._decay
            self._move(self._average, self._parameters, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """All workers: give the model the averaged weights inside the context."""
        self._swap(self._average)
        yield  # no `finally`: an exception ends the worker
        self._swap(self._average)

    def keep_best(self, stopping: Stopping) -> None:
        """Keep the model's weights as the best so far; call it inside `applied`."""
        if self._best is not None:
            self._best.copy_(self._parameters)
            self._best_buffers = self._flat.saved_buffers()
            stopping.counts = list(self._flat.counts)

    def finish(self, stopping: Stopping) -> None:
        """All workers: give the model the weights of the result, for good."""
        if self._best is None:
            self._swap(self._average)
        else:
            self._flat.set_buffers(self._best_buffers, stopping.counts)
            self._swap(self._best)

    def buffers(self) -> Tensor:
        """Return the buffers for a snapshot [kept_tail]: the model's, then the best."""
        return torch.cat([self._flat.saved_buffers(), self._best_buffers])

    def set_buffers(self, values: Tensor, counts: list[int]) -> None:
        """Restore what `buffers` returned; `counts` are the integer buffers."""
        current, best = torch.split(values, [self._flat.tail, len(self._best_buffers)])
        self._flat.set_buffers(current, counts)
        self._best_buffers = best.to(self._flat.device, copy=True)

    def _swap(self, vector: Tensor | None) -> None:
        """All workers, between two uses of the model: swap it with the parameters."""
        if vector is None:
            return
        trained = self._parameters.clone()
        self._parameters.copy_(vector)
        vector.copy_(trained)
        self._exchange.all_gather_parameters()
