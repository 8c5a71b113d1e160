"""What the model says about workers and nodes that were not measured. Pure.

A band is the bootstrap's 95% interval, widened on both sides by the model's own error
where it can be checked: the largest error on a measured point, or on the held-out one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from samestep.scaling.step_model import Model, Network


@dataclass(frozen=True)
class Forecaster:
    """A model, its bootstrapped siblings, and what they are held against."""

    model: Model
    drawn: Sequence[Model]
    margin: float
    """Relative error that bands allow for besides the bootstrap."""
    base_rates: dict[int, float]
    """Measured samples per second of 1 worker, by global batch."""
    critical_batch: float | None
    """Samples; from the gradient noise scale."""

    def machine(self, workers: int, batch: int, micro_batches: int) -> dict[str, Any]:
        """One more line of the predictions: this machine."""
        rate = self._band(lambda m: batch / m.step(workers, batch, micro_batches))
        return self._line("machine", workers, 1, batch, micro_batches, rate)

    def nodes(
        self,
        nodes: int,
        per_node: int,
        batch: int,
        micro_batches: int,
        network: Network,
    ) -> dict[str, Any]:
        """One more line of the predictions: nodes like this machine."""
        enough = even_micro_batches(micro_batches, nodes * per_node)
        rate = self._band(
            lambda m: batch / m.step(per_node, batch, enough, nodes, network)
        )
        return self._line("nodes", nodes * per_node, nodes, batch, enough, rate)

    def _band(self, rate: Callable[[Model], float]) -> tuple[float, float, float]:
        middle = rate(self.model)
        values = [middle, *map(rate, self.drawn)]
        low, high = np.percentile(values, (2.5, 97.5)).tolist()
        spread = 1 + self.margin
        return middle, min(low, middle) / spread, max(high, middle) * spread

    def _line(
        self,
        where: str,
        workers: int,
        nodes: int,
        batch: int,
        micro_batches: int,
        rate: tuple[float, float, float],
    ) -> dict[str, Any]:
        speedup = rate[0] / self.base_rates[batch]
        return {
            "where": where,
            "workers": workers,
            "nodes": nodes,
            "global_batch": batch,
            "micro_batches": micro_batches,
            "samples_per_second": rate[0],
            "low": rate[1],
            "high": rate[2],
            "speedup": speedup,
            "efficiency": speedup / workers,
            "relative_time_to_loss": self._time_to_loss(batch, rate[0]),
        }

    def _time_to_loss(self, batch: int, rate: float) -> float | None:
        if self.critical_batch is None:
            return None
        first = next(iter(self.base_rates))
        samples = relative_samples(batch, first, self.critical_batch)
        return samples * self.base_rates[first] / rate


def relative_samples(batch: int, reference: int, critical_batch: float) -> float:
    """Samples to the same loss at `batch`, relative to those at `reference`.

    E = E_min (1 + B / B_critical) (McCandlish et al. 2018, arXiv 1812.06162).
    """
    return (1 + batch / critical_batch) / (1 + reference / critical_batch)


def even_micro_batches(micro_batches: int, workers: int) -> int:
    """The recipe's, or the next multiple of the workers that gives all the same."""
    return workers * ceil(micro_batches / workers)


def machine_counts(measured: Sequence[int], cores: int, most: int) -> list[int]:
    """Which to predict: all up to twice the measured, or to one beyond the cores."""
    end = min(most, max(2 * max(measured), min(cores + 1, 4 * max(measured))))
    return list(range(1, end + 1))


def best_per_node(rates: dict[int, float], cores: int) -> int:
    """Of the measured worker counts within the cores, that with the highest rate."""
    within = {workers: rate for workers, rate in rates.items() if workers <= cores}
    return max(within or rates, key=lambda workers: rates[workers])
