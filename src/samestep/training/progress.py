"""The records of a training's progress that it reports."""

import torch

from samestep.core.metric import COUNTED
from samestep.core.progress import Progress
from samestep.data.dataset import Dataset
from samestep.messages.training import EpochRecord, Started, StepRecord
from samestep.training.timing import Times, by_phase
from samestep.training.trainer import Replica, Trainer


def started(trainer: Trainer) -> Started:
    """Return the message with which a training begins."""
    plan, replica = trainer.samples.plan, trainer.replica
    return Started(
        step=trainer.progress.step,
        steps_per_epoch=plan.steps_per_epoch,
        train_samples=plan.num_samples,
        parameters=sum(p.numel() for p in replica.model.parameters()),
        layout=replica.flat.layout.to_dict(),
        conditions=trainer.conditions,
        torch=torch.__version__,
        instruction_set=_instruction_set(replica),
    )


def _instruction_set(replica: Replica) -> str:
    """Return that of the kernels: torch's, or those of portable arithmetic."""
    if replica.passes is None:
        return torch.backends.cpu.get_cpu_capability()
    isa: bytes = replica.passes.kernels.isa
    return isa.decode()


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
