"""Where a training is, and the records that it reports."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from samestep.core.early_stopping import Stopping
from samestep.core.gradient_noise import Noise
from samestep.core.metric import COUNTED
from samestep.data.dataset import Dataset
from samestep.training.metrics import Sums
from samestep.training.timing import PHASES, Times, by_phase


Record = dict[str, Any]


@dataclass
class Progress:
    """Between two steps; part of every snapshot."""

    step: int = 0
    """Optimizer steps taken, over all epochs."""
    epoch: Sums = field(default_factory=Sums)
    """Of this epoch so far."""
    logged: Sums = field(default_factory=Sums)
    """Since the last step record."""
    noise: Noise = field(default_factory=Noise)
    seconds: float = 0.0
    """Of training in this epoch; time that a failure made void does not count."""
    phases: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    """Of this epoch before this process, mean over workers."""
    counts: list[int] = field(default_factory=list)
    """The values of the integer buffers."""
    stopping: Stopping = field(default_factory=Stopping)

    def to_dict(self) -> Record:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Record) -> "Progress":
        """The inverse of `to_dict`."""
        sums = {name: Sums(**fields[name]) for name in ("epoch", "logged")}
        noise = Noise(**fields["noise"])
        stopping = Stopping(**(fields.get("stopping") or {}))
        return cls(**{**fields, **sums, "noise": noise, "stopping": stopping})

    def begin_epoch(self) -> None:
        """What belongs to one epoch starts from zero."""
        self.epoch, self.logged, self.seconds = Sums(), Sums(), 0.0
        self.phases = [0.0] * len(PHASES)


@dataclass
class Stopwatch:
    """What the steps since the last records took."""

    workers: int
    epoch: Times = field(init=False)
    logged: Times = field(init=False)

    def __post_init__(self) -> None:
        self.epoch, self.logged = Times.zero(self.workers), Times.zero(self.workers)

    def add(self, times: Times) -> None:
        """One more stretch of steps."""
        self.epoch.add(times)
        self.logged.add(times)

    def take_epoch(self) -> Times:
        """Since the last call, or since this process began."""
        taken, self.epoch = self.epoch, Times.zero(self.workers)
        return taken

    def take_logged(self) -> Times:
        """Since the last call, or since this process began."""
        taken, self.logged = self.logged, Times.zero(self.workers)
        return taken


def step_record(
    progress: Progress, epoch: int, lr: float, times: Times, data: Dataset
) -> Record:
    """The steps since the last such record."""
    samples = progress.logged.targets / data.targets_per_sample
    return {
        "type": "step",
        "epoch": epoch + 1,
        "step": progress.step,
        **progress.logged.means(data.metrics),
        "lr": lr,
        "samples_per_second": samples / times.seconds[0].sum().item(),
        **times.to_dict(),
        "noise_scale": progress.noise.scale,
        **own_metrics(data),
    }


def epoch_record(progress: Progress, epoch: int, times: Times, data: Dataset) -> Record:
    """One whole epoch, as in result.json; `times` since the last start of workers."""
    before = torch.tensor(progress.phases, dtype=torch.float64)
    means = progress.epoch.means(data.metrics)
    samples = progress.epoch.targets / data.targets_per_sample
    return {
        "type": "epoch",
        "epoch": epoch + 1,
        "seconds": progress.seconds,
        **{f"train_{key}": value for key, value in means.items()},
        "samples_per_second": samples / progress.seconds,
        "seconds_by_phase": by_phase(times.seconds.mean(dim=0) + before),
        **times.to_dict(),
        "noise_scale": progress.noise.scale,
        **own_metrics(data),
    }


def own_metrics(data: Dataset) -> Record:
    """What a person is to see besides the loss, if it is not the usual metric."""
    names = [metric.name for metric in data.own_metrics if metric != COUNTED]
    return {"own_metrics": names} if names else {}
