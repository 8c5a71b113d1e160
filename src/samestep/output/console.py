"""What a person sees of a training while it runs, all of it on stderr.

On a terminal a live table, elsewhere one line per epoch. The lines, and those above the
table, go through the logger `samestep` (`samestep.system.log`).
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from samestep.config.recipe import Recipe
from samestep.messages.training import (
    CaughtUp,
    CheckpointFailed,
    EpochRecord,
    Evicted,
    GenerationFailed,
    Message,
    NoTargets,
    Rebalanced,
    Restarted,
    SlowStart,
    Started,
    StepRecord,
    StragglerFound,
    UnusedParameters,
    WorkerWarning,
)
from samestep.messages.wire import as_record
from samestep.system.log import logger


Record = Mapping[str, Any]


class View(AbstractContextManager["View"], Protocol):
    """Shows the notices of the supervisor and the messages of rank 0."""

    def note(self, text: str) -> None:
        """Show one line."""

    def warn(self, text: str) -> None:
        """Show one line as a warning."""
        self.note(f"warning: {text}")

    def receive(self, message: Message) -> None:
        """Show a message of rank 0 or of the recovery, or ignore it."""


class SilentView(View):
    """A view that shows nothing."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def receive(self, message: Message) -> None:
        """Do nothing."""


class PlainView(View):
    """A view of one line per epoch, which goes to the logger like all notices."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Log a line."""
        logger.info("%s", text)

    def warn(self, text: str) -> None:
        """Log a warning."""
        logger.warning("%s", text)

    def receive(self, message: Message) -> None:
        """Log epochs, warnings and failures.

        The error that ends the training is left to the caller, who raises it.
        """
        if isinstance(message, EpochRecord):
            self.note(epoch_line(as_record(message), self._recipe.epochs))
        elif text := sentence(message):
            logger.log(level(message), "%s", text)


class LiveView(PlainView):
    """A progress bar, the latest numbers, and each worker's use of its time.

    Lines of the logger appear above them.
    """

    def __init__(self, console: Console, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None, visible=False)
        self._live = Live(console=console, transient=True, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the live part; the lines above it stay."""
        self._live.stop()

    def receive(self, message: Message) -> None:
        """Update the live part; an epoch also leaves a line above it."""
        super().receive(message)
        if isinstance(message, Started):
            total = message.steps_per_epoch * self._recipe.epochs
            self._bar.update(self._task, total=total, visible=True)
        elif isinstance(message, StepRecord):
            epoch = f"epoch {message.epoch}/{self._recipe.epochs}"
            self._bar.update(self._task, description=epoch, completed=message.step)
            self._live.update(Group(self._bar, _numbers(message), _workers(message)))


def make_view(recipe: Recipe) -> View:
    """Return the view that suits stderr; rich honours NO_COLOR."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, recipe)
    return PlainView(recipe)


def sentence(message: Message) -> str | None:
    """Return the line that a message leaves, or None."""
    match message:
        case GenerationFailed(final=True):
            return None  # the command shows the error with which it ends
        case GenerationFailed(error=error):
            return f"failure: {error}"
        case SlowStart(phase=phase, seconds=seconds, patience=patience):
            return (
                f"still {phase}, after {seconds:.0f} s; `--start-timeout` allows "
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


def epoch_line(epoch: Record, epochs: int) -> str:
    """Return `epoch 1/3  train loss 0.4386 accuracy 93.33%  validation ...`."""
    parts = [f"epoch {epoch['epoch']}/{epochs}"]
    for split in ("train", "validation"):
        if f"{split}_loss" in epoch:
            parts.append(f"{split} {scores(epoch, f'{split}_')}")
    rate = f"{epoch['samples_per_second']:,.0f} samples/s"
    return "  ".join([*parts, f"{epoch['seconds']:.2f} s", rate])


def _numbers(step: StepRecord) -> str:
    return (
        f"{scores(as_record(step), separator='   ')}   "
        f"{step.samples_per_second:,.0f} samples/s   lr {step.lr:.2e}"
    )


def _workers(step: StepRecord) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("worker", "share", "speed", "compute", "exchange", "waiting")
    for column in columns:
        table.add_column(column, justify="right")
    fastest = max(step.speeds) or 1.0
    for rank, seconds in enumerate(step.times.workers):
        total = sum(seconds.values()) or 1.0
        exchange, wait = seconds["exchange"] / total, seconds["wait"] / total
        table.add_row(
            str(rank),
            str(step.shares[rank]),
            f"{step.speeds[rank] / fastest:.0%}",
            f"{1 - exchange - wait:.0%}",
            f"{exchange:.0%}",
            f"{wait:.0%}",
        )
    return table
