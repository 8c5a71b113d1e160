"""Shows the progress of a training.

On a terminal there is a live table, elsewhere one line per epoch. The lines,
and those above the table, go through the logger `samestep` (`samestep.system.log`).
"""

import sys
from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from samestep.config.recipe import Recipe
from samestep.messages.training import (
    EpochRecord,
    EvaluationRecord,
    Message,
    Started,
    StepRecord,
)
from samestep.messages.wire import as_record
from samestep.output.sentences import (
    epoch_line,
    epoch_name,
    evaluation_line,
    level,
    scores,
    sentence,
)
from samestep.system.log import logger


class View(AbstractContextManager["View"]):
    """Shows the notices of the supervisor and the messages of rank 0; this one none."""

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Show one line."""

    def warn(self, text: str) -> None:
        """Show one line as a warning."""
        self.note(f"warning: {text}")

    def receive(self, message: Message) -> None:
        """Show a message of rank 0 or of the recovery, or ignore it."""


class SilentView(View):
    """A view that shows nothing."""


class PlainView(View):
    """A view of one line per epoch, which goes to the logger like all notices."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._epochs = recipe.epochs
        """How many there are, if that is known."""

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
        if isinstance(message, Started) and (steps := message.steps_per_epoch):
            self._epochs = -(-self._recipe.num_steps(steps) // steps)
        if isinstance(message, EpochRecord):
            self.note(epoch_line(as_record(message), self._epochs))
        elif isinstance(message, EvaluationRecord):
            self.note(evaluation_line(as_record(message)))
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
            TextColumn("step"),
            MofNCompleteColumn(),
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
            total = self._recipe.num_steps(message.steps_per_epoch) or None
            self._bar.update(self._task, total=total, visible=True)
        elif isinstance(message, StepRecord):
            epoch = epoch_name(message.epoch, self._epochs)
            self._bar.update(self._task, description=epoch, completed=message.step)
            self._live.update(Group(self._bar, _numbers(message), _workers(message)))


def make_view(recipe: Recipe) -> View:
    """Return the view that suits stderr; rich honours NO_COLOR.

    Asks stderr itself: with FORCE_COLOR, rich calls a pipe a terminal, too, and would
    wrap the lines.
    """
    console = Console(stderr=True)
    is_live = sys.stderr.isatty() and not console.is_dumb_terminal
    return LiveView(console, recipe) if is_live else PlainView(recipe)


def _numbers(step: StepRecord) -> str:
    return (
        f"{scores(as_record(step), separator='   ')}   "
        f"{step.samples_per_second:,.0f} samples/s   lr {step.lr:.2e}"
    )


def _workers(step: StepRecord) -> Table:
    names = ("worker", "share", "speed", "compute", "exchange", "waiting")
    columns = [Column(name, justify="right") for name in names]
    table = Table(*columns, box=None, pad_edge=False)
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
