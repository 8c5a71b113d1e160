"""What a person sees while a training goes on; all of it on stderr.

On a terminal a live table, elsewhere one plain line per epoch.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from samestep.config.recipe import Recipe
from samestep.system.terminal import clean


Message = Mapping[str, Any]


class View(AbstractContextManager["View"], Protocol):
    """Shows the notices of the supervisor and the reports of rank 0."""

    def note(self, text: str) -> None:
        """One line before or during the training."""

    def receive(self, message: Message) -> None:
        """A report of rank 0."""


class SilentView(View):
    """Shows nothing."""

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def note(self, text: str) -> None:
        """Not shown."""

    def receive(self, message: Message) -> None:
        """Not shown."""


class PlainView(View):
    """One line per epoch, without control characters."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        self._console = console
        self._recipe = recipe

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def note(self, text: str) -> None:
        """One line."""
        self._console.print(clean(text), markup=False, highlight=False, soft_wrap=True)

    def receive(self, message: Message) -> None:
        """Epochs and failures only; the one that ends all is shown by who ends."""
        if message["type"] == "epoch":
            self.note(epoch_line(message, self._recipe.epochs))
        elif message["type"] in _SENTENCES and not message.get("final"):
            self.note(_SENTENCES[message["type"]](message))


class LiveView(View):
    """A progress bar, the latest numbers, and each worker's use of its time."""

    def __init__(self, console: Console, recipe: Recipe) -> None:
        self._plain = PlainView(console, recipe)
        self._recipe = recipe
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the live part; what was printed above it stays."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Above the live part."""
        self._plain.note(text)

    def receive(self, message: Message) -> None:
        """Updates the live part; an epoch also leaves its line above."""
        self._plain.receive(message)
        if message["type"] == "started":
            total = message["steps_per_epoch"] * self._recipe.epochs
            self._bar.update(self._task, total=total, visible=True)
        elif message["type"] == "step":
            epoch = f"epoch {message['epoch']}/{self._recipe.epochs}"
            self._bar.update(self._task, description=epoch, completed=message["step"])
            self._live.update(Group(self._bar, _numbers(message), _workers(message)))


def make_view(recipe: Recipe) -> View:
    """The view that suits stderr; NO_COLOR is honoured."""
    console = Console(stderr=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveView(console, recipe)
    return PlainView(console, recipe)


_SENTENCES: dict[str, Callable[[Message], str]] = {
    "failed": lambda m: f"failure: {m['error']}",
    "slow start": lambda m: (
        f"still {m['phase']}, after {m['seconds']:.0f} s; `--start-timeout` allows "
        f"{m['patience']:.0f} s"
    ),
    "restart": lambda m: (
        f"restart {m['number']}: going on after step {m['step']} with {m['workers']} "
        f"worker{'s' if m['workers'] > 1 else ''}"
    ),
    "unused": lambda m: (
        f"warning: no gradient reached {_few(m['parameters'])} in a pass over two "
        "samples. Where a parameter has none, it counts as zero; if it never has one, "
        "freeze it with `requires_grad_(False)`, or use it in `forward`."
    ),
    "rebalanced": lambda m: (
        f"rebalanced after step {m['step']}: {_counts(m['after'])} micro-batches "
        f"instead of {_counts(m['before'])}, {m['gain']:.0%} less time"
        + (
            " (drawing samples takes most of the slowest worker's time)"
            if m["cause"] == "data"
            else ""
        )
    ),
    "hindered": lambda m: (
        f"worker {m['worker']} runs at {m['speed']:.2f} of the fastest's speed: a step "
        f"would take {m['gain']:.0%} less time without it. Use fewer workers, or "
        "`--evict-slower-than 0.1`."
    ),
    "evicted": lambda m: (
        f"worker {m['worker']} leaves after step {m['step']}: it is slower than "
        "`--evict-slower-than` allows"
    ),
    "warning": lambda m: f"warning: {m['text']}",
    "no targets": lambda m: (
        f"step {m['step']}: no target counts, all are ignored; the gradient is zero"
    ),
    "caught up": lambda m: f"caught up with step {m['step']}, {m['after']:.2f} s later",
}
"""What a person is told about a recovery."""


def _counts(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def scores(
    record: Message, prefix: str = "", separator: str = " ", digits: int = 4
) -> str:
    """`loss 0.4386 accuracy 93.33%`, from the fields with this prefix."""
    loss = f"loss {record[f'{prefix}loss']:.{digits}f}"
    own = record.get("own_metrics") or ()
    found = [
        f"{n} {record[f'{prefix}{n}']:.4f}" for n in own if f"{prefix}{n}" in record
    ]
    if not found and f"{prefix}accuracy" in record:
        found = [f"accuracy {record[f'{prefix}accuracy']:.2%}"]
    if not found and f"{prefix}absolute_error" in record:
        found = [f"absolute error {record[f'{prefix}absolute_error']:.4f}"]
    return separator.join([loss, *found])


def epoch_line(epoch: Message, epochs: int) -> str:
    """`epoch 1/3  train loss 0.4386 accuracy 93.33%  validation ...`."""
    parts = [f"epoch {epoch['epoch']}/{epochs}"]
    for split in ("train", "validation"):
        if f"{split}_loss" in epoch:
            parts.append(f"{split} {scores(epoch, f'{split}_')}")
    rate = f"{epoch['samples_per_second']:,.0f} samples/s"
    return "  ".join([*parts, f"{epoch['seconds']:.2f} s", rate])


def _numbers(step: Message) -> str:
    return (
        f"{scores(step, separator='   ')}   "
        f"{step['samples_per_second']:,.0f} samples/s   lr {step['lr']:.2e}"
    )


def _workers(step: Message) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("worker", "share", "speed", "compute", "exchange", "waiting")
    for column in columns:
        table.add_column(column, justify="right")
    fastest = max(step["speeds"]) or 1.0
    for rank, seconds in enumerate(step["workers"]):
        total = sum(seconds.values()) or 1.0
        exchange, wait = seconds["exchange"] / total, seconds["wait"] / total
        table.add_row(
            str(rank),
            str(step["shares"][rank]),
            f"{step['speeds'][rank] / fastest:.0%}",
            f"{1 - exchange - wait:.0%}",
            f"{exchange:.0%}",
            f"{wait:.0%}",
        )
    return table
