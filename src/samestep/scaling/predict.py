"""Predictions for workers and nodes that were not measured. Pure.

A band is the bootstrap's 95% interval, widened on both sides by the model's own error
where it can be checked: the largest error on a measured point, or on the held-out one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from samestep.output.schema import Prediction
from samestep.scaling.intervals import band
from samestep.scaling.step_model import NO_NETWORK, Model, Network, work


@dataclass(frozen=True)
class Forecaster:
    """A model, its bootstrap resamples, and the measured speeds to compare with."""

    model: Model
    resampled: Sequence[Model]
    margin: float
    """Relative error that bands allow for besides the bootstrap."""
    base_rates: dict[int, float]
    """Measured samples per second of 1 worker, by global batch."""
    critical_batch: float | None
    """Samples; from the gradient noise scale."""

    def predict(
        self,
        workers: int,
        batch: int,
        micro_batches: int,
        nodes: int = 1,
        network: Network | None = None,
    ) -> Prediction:
        """Predict `workers` on this machine, or with `network` on each of `nodes`."""
        together = nodes * workers
        if network:
            micro_batches = even_micro_batches(micro_batches, together)
        done = work(workers, batch, micro_batches, nodes)
        rate, *others = (
            batch / model.step(done, network or NO_NETWORK)
            for model in (self.model, *self.resampled)
        )
        low, high = band(rate, [rate, *others])
        speedup = rate / self.base_rates[batch]
        return Prediction(
            where="nodes" if network else "machine",
            workers=together,
            nodes=nodes,
            global_batch=batch,
            micro_batches=micro_batches,
            samples_per_second=rate,
            low=low / (1 + self.margin),
            high=high * (1 + self.margin),
            speedup=speedup,
            efficiency=speedup / together,
            relative_time_to_loss=self._time_to_loss(batch, rate),
        )

    def _time_to_loss(self, batch: int, rate: float) -> float | None:
        """Return the time to the same loss, relative to 1 worker at the first batch."""
        if self.critical_batch is None:
            return None
        first = next(iter(self.base_rates))
        samples = relative_samples(batch, first, self.critical_batch)
        return samples * self.base_rates[first] / rate


def relative_samples(batch: int, reference: int, critical_batch: float) -> float:
    """Return samples to the same loss at `batch`, relative to those at `reference`.

    E = E_min (1 + B / B_critical) (McCandlish et al. 2018, arXiv 1812.06162).
    """
    return (1 + batch / critical_batch) / (1 + reference / critical_batch)


def even_micro_batches(micro_batches: int, workers: int) -> int:
    """Return the next multiple of the workers, so that all own equally many."""
    return workers * ceil(micro_batches / workers)


def machine_counts(measured: Sequence[int], cores: int, most: int) -> list[int]:
    """Return which worker counts to predict.

    They go up to twice the measured ones, or to one beyond the cores.
    """
    end = min(most, max(2 * max(measured), min(cores + 1, 4 * max(measured))))
    return list(range(1, end + 1))


def best_per_node(rates: dict[int, float], cores: int) -> int:
    """Return the fastest of the measured worker counts that fit the cores."""
    within = {workers: rate for workers, rate in rates.items() if workers <= cores}
    return max(within or rates, key=lambda workers: rates[workers])
