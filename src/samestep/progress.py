"""Where a training is, and the records that it reports."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from samestep.metrics import Sums
from samestep.timing import PHASES


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
    seconds: float = 0.0
    """Of training in this epoch; time that a failure made void does not count."""
    phases: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))
    """Of this epoch before this process, mean over workers."""
    counts: list[int] = field(default_factory=list)
    """The values of the integer buffers."""

    def to_dict(self) -> Record:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Record) -> "Progress":
        """The inverse of `to_dict`."""
        sums = {name: Sums(**fields[name]) for name in ("epoch", "logged")}
        return cls(**{**fields, **sums})

    def begin_epoch(self) -> None:
        """What belongs to one epoch starts from zero."""
        self.epoch, self.logged, self.seconds = Sums(), Sums(), 0.0
        self.phases = [0.0] * len(PHASES)


@dataclass
class Stopwatch:
    """Seconds of each worker by phase, as float64 [workers, phases]."""

    workers: int
    epoch: Tensor = field(init=False)
    logged: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.epoch, self.logged = self._zeros(), self._zeros()

    def add(self, seconds: Tensor) -> None:
        """One more stretch of steps."""
        self.epoch += seconds
        self.logged += seconds

    def take_epoch(self) -> Tensor:
        """Since the last call, or since this process began."""
        taken, self.epoch = self.epoch, self._zeros()
        return taken

    def take_logged(self) -> Tensor:
        """Since the last call, or since this process began."""
        taken, self.logged = self.logged, self._zeros()
        return taken

    def _zeros(self) -> Tensor:
        return torch.zeros(self.workers, len(PHASES), dtype=torch.float64)


def step_record(progress: Progress, epoch: int, lr: float, phases: Tensor) -> Record:
    """The steps since the last such record; `phases` of each worker, in seconds."""
    return {
        "type": "step",
        "epoch": epoch + 1,
        "step": progress.step,
        **progress.logged.means(),
        "lr": lr,
        "samples_per_second": progress.logged.samples / phases[0].sum().item(),
        "workers": [by_phase(row) for row in phases],
    }


def epoch_record(progress: Progress, epoch: int, phases: Tensor) -> Record:
    """One whole epoch, as in result.json; `workers` since the last start of workers."""
    mean = phases.mean(dim=0) + torch.tensor(progress.phases, dtype=torch.float64)
    means = {f"train_{key}": value for key, value in progress.epoch.means().items()}
    return {
        "type": "epoch",
        "epoch": epoch + 1,
        "seconds": progress.seconds,
        **means,
        "samples_per_second": progress.epoch.samples / progress.seconds,
        "seconds_by_phase": by_phase(mean),
        "workers": [by_phase(row) for row in phases],
    }


def by_phase(seconds: Tensor) -> dict[str, float]:
    """[phases] -> seconds by name."""
    return dict(zip(PHASES, seconds.tolist(), strict=True))
