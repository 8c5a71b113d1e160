"""The progress of a training, and the records that it reports."""

from dataclasses import dataclass, field

import torch

from samestep.core.early_stopping import Stopping
from samestep.core.gradient_noise import Noise
from samestep.core.metric import COUNTED
from samestep.data.dataset import Dataset
from samestep.messages.training import EpochRecord, StepRecord
from samestep.system.json_values import JsonObject
from samestep.training.metrics import MetricSums
from samestep.training.timing import PHASES, Times, by_phase


@dataclass
class Progress:
    """The progress between two steps; part of every snapshot."""

    step: int = 0
    """Optimizer steps taken, over all epochs."""
    epoch: MetricSums = field(default_factory=MetricSums)
    """Loss and metrics of this epoch so far."""
    logged: MetricSums = field(default_factory=MetricSums)
    """Loss and metrics since the last step record."""
    noise: Noise = field(default_factory=Noise)
    seconds: float = 0.0
    """Seconds of training in this epoch, without steps that a failure undid."""
    phases: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    """Seconds by phase of this epoch before this process, mean over workers."""
    counts: list[int] = field(default_factory=list)
    """The values of the integer buffers."""
    stopping: Stopping = field(default_factory=Stopping)

    @classmethod
    def from_dict(cls, fields: JsonObject) -> "Progress":
        """Return the progress of which these are the fields, as JSON values."""
        sums = {name: MetricSums(**fields[name]) for name in ("epoch", "logged")}
        noise = Noise(**fields["noise"])
        stopping = Stopping(**(fields.get("stopping") or {}))
        return cls(**{**fields, **sums, "noise": noise, "stopping": stopping})

    def begin_epoch(self) -> None:
        """Reset what belongs to one epoch."""
        self.epoch, self.logged, self.seconds = MetricSums(), MetricSums(), 0.0
        self.phases = [0.0] * len(PHASES)


def step_record(
    progress: Progress, epoch: int, lr: float, times: Times, data: Dataset
) -> StepRecord:
    """Return the record of the steps since the last one."""
    samples = progress.logged.targets / data.targets_per_sample
    return StepRecord(
        epoch=epoch + 1,
        step=progress.step,
        metrics=progress.logged.means(data.metrics),
        lr=lr,
        samples_per_second=samples / times.seconds[0].sum().item(),
        times=times.use(),
        noise_scale=progress.noise.scale,
        own_metrics=own_metrics(data),
    )


def epoch_record(
    progress: Progress,
    epoch: int,
    times: Times,
    data: Dataset,
    minor_faults_per_step: float,
) -> EpochRecord:
    """Return the record of a whole epoch, without its evaluation.

    `times` is since the last start of the workers; `progress.phases` is from before.
    """
    before = torch.tensor(progress.phases, dtype=torch.float64)
    means = progress.epoch.means(data.metrics)
    samples = progress.epoch.targets / data.targets_per_sample
    return EpochRecord(
        epoch=epoch + 1,
        seconds=progress.seconds,
        train_metrics={f"train_{key}": value for key, value in means.items()},
        samples_per_second=samples / progress.seconds,
        seconds_by_phase=by_phase(times.seconds.mean(dim=0) + before),
        times=times.use(),
        noise_scale=progress.noise.scale,
        own_metrics=own_metrics(data),
        minor_faults_per_step=minor_faults_per_step,
    )


def own_metrics(data: Dataset) -> list[str] | None:
    """Return the names of metrics to show besides the loss; None: the usual one."""
    names = [metric.name for metric in data.own_metrics if metric != COUNTED]
    return names or None
