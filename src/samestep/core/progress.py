"""The progress of a training between two steps; part of every snapshot and checkpoint.

No torch is needed.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from samestep.config.schedule import PlateauLR
from samestep.config.training import EarlyStoppingRecipe
from samestep.core.metric import COUNTED, Metric
from samestep.system.json_values import JsonObject


DECAY = 0.95
"""The weight of an older estimate beside the next: about 20 watched steps count."""
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class MetricSums(_Part):
    """Totals over targets, such as samples or tokens."""

    loss: float = 0.0
    metrics: list[float] = []
    """Cells of metrics (`core.metric.Metric`), exact if they count; none: all zero."""
    targets: Count = 0

    def add(self, other: "MetricSums") -> None:
        """Add other sums. The order of the calls decides the rounding."""
        self.loss += other.loss
        before = self.metrics or [0.0] * len(other.metrics)
        self.metrics = [a + b for a, b in zip(before, other.metrics, strict=True)]
        self.targets += other.targets

    def divisor(self, metrics: Sequence[Metric]) -> float:
        """Return the divisor of the loss and of metrics without a count."""
        return self.metrics[1] if COUNTED in metrics else self.targets

    def means(self, metrics: Sequence[Metric]) -> dict[str, float]:
        """Return `loss` and the metrics by name, per target or by their own counts.

        Metrics whose count is zero are left out: JSON has no NaN. The loss is 0 if no
        target counts.
        """
        means = {"loss": self.loss / self.targets}
        divisor = self.divisor(metrics)
        cells = iter(self.metrics)
        for metric in metrics:
            total = next(cells)
            count = next(cells) if metric.has_count else divisor
            if count:
                means[metric.name] = total / count
        return means


class Noise(_Part):
    """Decaying sums over the watched steps; the noise scale is their ratio.

    A ratio of sums: both estimates are noisy, so a mean of ratios would be biased.
    The sums have the same weights, so it is the ratio of the exponential averages.
    """

    signal: float = 0.0
    """Estimates of |G|^2 (`core.gradient_noise`); a single one may be negative."""
    variance: float = 0.0
    """Estimates of tr(S), for single samples."""

    def add(self, signal: float, variance: float) -> None:
        """Add the estimates of one watched step."""
        self.signal = DECAY * self.signal + signal
        self.variance = DECAY * self.variance + variance

    @property
    def scale(self) -> float | None:
        """The noise scale in samples; None while an estimate is not positive."""
        if self.signal <= 0 or self.variance <= 0:
            return None
        return self.variance / self.signal


def improves(metric: str, value: float, best: float | None, min_delta: float) -> bool:
    """Return whether a value is the best so far, by more than `min_delta`."""
    sign = -1 if metric == "validation_accuracy" else 1
    return best is None or sign * value < sign * best - min_delta


class Plateau(_Part):
    """The state of a schedule that looks at evaluations, as in torch's."""

    factor: float = 1.0
    """The factor of the learning rate."""
    best: float | None = None
    """The best value so far."""
    waited: Count = 0
    """Evaluations since the best one or the last reduction that count."""
    cooldown: Count = 0
    """Evaluations that do not count any more."""

    def observe(self, schedule: PlateauLR, value: float) -> None:
        """Take the value of an evaluation."""
        if improves(schedule.metric, value, self.best, schedule.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.cooldown:
            self.cooldown, self.waited = self.cooldown - 1, 0
        if self.waited > schedule.patience:
            self.factor = max(self.factor * schedule.factor, schedule.final)
            self.cooldown, self.waited = schedule.cooldown, 0


class Stopping(_Part):
    """The state of early stopping, of exact numbers: so all workers agree."""

    best: float | None = None
    """The best value so far."""
    best_epoch: Count = 0
    """The epoch of the best value, counted from 1; 0 before there is one."""
    best_step: Count = 0
    """Optimizer steps taken until then."""
    waited: Count = 0
    """Evaluations since the best one."""
    counts: list[int] = []
    """The integer buffers of the best weights, if these are kept."""

    def observe(
        self, recipe: EarlyStoppingRecipe, value: float, epoch: int, step: int
    ) -> bool:
        """Take the value after `step` steps, in an epoch counted from 1.

        Returns whether it is the best.
        """
        if improves(recipe.metric, value, self.best, recipe.min_delta):
            self.best, self.best_epoch, self.best_step = value, epoch, step
            self.waited = 0
            return True
        self.waited += 1
        return False

    def is_over(self, recipe: EarlyStoppingRecipe | None) -> bool:
        """Return whether the patience is exhausted; without a recipe it never is."""
        return recipe is not None and self.waited >= recipe.patience


class StreamPosition(_Part):
    """Where a stream of training samples is before a step."""

    epoch: Count = 0
    first_step: Count = 0
    """The first step of this epoch, counted over all epochs."""
    bookmark: JsonObject | None = None
    """A `data.stream.Bookmark`; None: it is read again from the start of the epoch."""


class Progress(_Part):
    """All of it; `samestep.training` knows the phases."""

    step: Count = 0
    """Optimizer steps taken, over all epochs."""
    epochs: Count = 0
    """Complete epochs."""
    stream: StreamPosition | None = None
    """None unless the training samples are a stream."""
    epoch: MetricSums = MetricSums()
    """Loss and metrics of this epoch so far."""
    logged: MetricSums = MetricSums()
    """Loss and metrics since the last step record."""
    hashes: str = ""
    """The hashes of these steps (`state.hashing.StepHashes`), one after the other."""
    micro_batch_hashes: str = ""
    """And those of their micro-batches, each with its worker, if there are any."""
    noise: Noise = Noise()
    seconds: float = 0.0
    """Seconds of training in this epoch, without steps that a failure undid."""
    phases: list[float]
    """Seconds by phase of this epoch before this process, mean over workers."""
    counts: list[int]
    """The values of the integer buffers."""
    optimizer: JsonObject = {}
    """What a custom optimizer keeps besides tensors."""
    plateau: Plateau = Plateau()
    validation_loss: float | None = None
    """The loss of an evaluation after the last step."""
    # Older checkpoints have none.
    stopping: Annotated[Stopping, BeforeValidator(lambda it: it or {})] = Stopping()

    def begin_epoch(self) -> None:
        """Count the epoch that is over, and reset what belonged to it."""
        self.epochs += 1
        self.epoch, self.logged, self.seconds = MetricSums(), MetricSums(), 0.0
        self.phases = [0.0] * len(self.phases)
