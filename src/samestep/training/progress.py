"""The records of a training's progress that it reports."""

import torch

from samestep.core.metric import COUNTED
from samestep.core.progress import Progress
from samestep.data.dataset import Dataset
from samestep.messages.training import (
    EpochRecord,
    EvaluationRecord,
    Evicted,
    Started,
    StepRecord,
    Stopped,
)
from samestep.portable.passes import RecordedPasses
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
    if not isinstance(replica.passes, RecordedPasses):
        return torch.backends.cpu.get_cpu_capability()
    isa: bytes = replica.passes.kernels.isa
    return isa.decode()


def stopped(trainer: Trainer, leaving: int | None) -> Stopped | Evicted:
    """Return the message of an end before the last step.

    It is as asked, or to go on without the worker that is `leaving`.
    """
    step, speeds = trainer.progress.step, trainer.ownership.balancer.speeds
    if leaving is None:
        return Stopped(step=step)
    return Evicted(step=step, worker=leaving, speeds=speeds)


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
        hashes=progress.hashes,
        micro_batch_hashes=progress.micro_batch_hashes,
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
    samples = progress.epoch.targets / data.targets_per_sample
    return EpochRecord(
        epoch=epoch + 1,
        step=progress.step,
        seconds=progress.seconds,
        train_metrics=train_means(progress, data),
        samples_per_second=samples / progress.seconds,
        seconds_by_phase=by_phase(times.seconds.mean(dim=0) + before),
        times=times.use(),
        noise_scale=progress.noise.scale,
        own_metrics=own_metrics(data),
        minor_faults_per_step=minor_faults_per_step,
    )


def train_means(progress: Progress, data: Dataset) -> dict[str, float]:
    """Return the loss and metrics of the epoch so far, as `train_loss` and so on."""
    means = progress.epoch.means(data.metrics)
    return {f"train_{key}": value for key, value in means.items()}


def evaluation_record(
    step: int, epoch: int, metrics: dict[str, float], sha256: str, data: Dataset
) -> EvaluationRecord:
    """Return the record of an evaluation after `step` steps; `epoch` counts from 0."""
    return EvaluationRecord(
        epoch=epoch + 1,
        step=step,
        validation_metrics=metrics,
        own_metrics=own_metrics(data),
        weights_sha256=sha256,
    )


def own_metrics(data: Dataset) -> list[str] | None:
    """Return the names of metrics to show besides the loss; None: the usual one."""
    names = [metric.name for metric in data.own_metrics if metric != COUNTED]
    return names or None
