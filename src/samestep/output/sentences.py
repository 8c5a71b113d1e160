"""The lines that messages and epochs leave on the console."""

import logging
from collections.abc import Mapping
from typing import Any

from samestep.messages.training import (
    CaughtUp,
    CheckpointFailed,
    Evicted,
    GenerationFailed,
    Message,
    NoTargets,
    Rebalanced,
    Restarted,
    SlowStart,
    StragglerFound,
    UnusedParameters,
    WorkerWarning,
)


Record = Mapping[str, Any]


def sentence(message: Message) -> str | None:
    """Return the line that a message leaves, or None."""
    match message:
        case GenerationFailed(final=True):
            return None  # the command shows the error with which it ends
        case GenerationFailed(error=error):
            return f"failure: {error}"
        case SlowStart(phase=phase, waited=waited, patience=patience):
            return (
                f"still {phase}, after {waited:.0f} s; `--start-timeout` allows "
                f"{patience:.0f} s"
            )
        case Restarted(number=number, step=step, workers=workers):
            count = "1 worker" if workers == 1 else f"{workers} workers"
            return f"restart {number}: going on after step {step} with {count}"
        case UnusedParameters(parameters=parameters):
            return (
                f"no gradient reached {_few(parameters)} in a pass over two samples. "
                "A parameter without a gradient counts as having a zero one; if it "
                "never has any, freeze it with `requires_grad_(False)`, or use it in "
                "`forward`."
            )
        case Rebalanced():
            return _rebalanced(message)
        case StragglerFound(worker=worker, speed=speed, gain=gain):
            return (
                f"worker {worker} runs at {speed:.2f} of the fastest's speed: a step "
                f"would take {gain:.0%} less time without it. Use fewer workers, or "
                "`--drop-stragglers-below 0.1`."
            )
        case Evicted(worker=worker, step=step):
            return (
                f"worker {worker} leaves after step {step}: it is slower than "
                "`--drop-stragglers-below` allows"
            )
        case WorkerWarning(text=text):
            return text
        case NoTargets(step=step):
            return (
                f"step {step}: no target counts, all are ignored; the gradient is zero"
            )
        case CaughtUp(step=step, after=after):
            return f"caught up with step {step}, {after:.2f} s later"
        case CheckpointFailed(step=step, error=error):
            return (
                f"the checkpoint of step {step} cannot be written: {error}. "
                "Earlier checkpoints stay."
            )
    return None


def level(message: Message) -> int:
    """Return the level at which the line of a message is logged."""
    match message:
        case GenerationFailed():
            return logging.ERROR
        case UnusedParameters() | WorkerWarning() | CheckpointFailed():
            return logging.WARNING
    return logging.INFO


def _rebalanced(message: Rebalanced) -> str:
    text = (
        f"rebalanced after step {message.step}: {_counts(message.after)} micro-batches "
        f"instead of {_counts(message.before)}, {message.gain:.0%} less time"
    )
    if message.cause == "data":
        text += " (drawing samples takes most of the slowest worker's time)"
    return text


def _counts(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def scores(
    record: Record, prefix: str = "", separator: str = " ", digits: int = 4
) -> str:
    """Return `loss 0.4386 accuracy 93.33%`, from the fields with this prefix.

    Metrics of a loss function of the user's own take the place of the accuracy.
    """
    loss = f"loss {record[f'{prefix}loss']:.{digits}f}"
    own = record.get("own_metrics") or ()
    metrics = [
        f"{n} {record[f'{prefix}{n}']:.4f}" for n in own if f"{prefix}{n}" in record
    ]
    if not metrics and f"{prefix}accuracy" in record:
        metrics = [f"accuracy {record[f'{prefix}accuracy']:.2%}"]
    if not metrics and f"{prefix}absolute_error" in record:
        metrics = [f"absolute error {record[f'{prefix}absolute_error']:.4f}"]
    return separator.join([loss, *metrics])


def evaluation_line(record: Record) -> str:
    """Return `step 200  validation loss 0.4386 accuracy 93.33%`."""
    return f"step {record['step']}  validation {scores(record, 'validation_')}"


def epoch_name(epoch: int, epochs: int | None) -> str:
    """Return `epoch 1/3`, or `epoch 1` if it is not known how many there are."""
    return f"epoch {epoch}/{epochs}" if epochs else f"epoch {epoch}"


def epoch_line(epoch: Record, epochs: int | None) -> str:
    """Return `epoch 1/3  train loss 0.4386 accuracy 93.33%  validation ...`."""
    parts = [epoch_name(epoch["epoch"], epochs)]
    for split in ("train", "validation"):
        if f"{split}_loss" in epoch:
            parts.append(f"{split} {scores(epoch, f'{split}_')}")
    rate = f"{epoch['samples_per_second']:,.0f} samples/s"
    return "  ".join([*parts, f"{epoch['seconds']:.2f} s", rate])
