"""What a person sees: progress on stderr, the table at the end on stdout."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from samestep.scaling.measure import Watcher
from samestep.system.terminal import clean


PLAIN_SECONDS = 10.0
"""Between two plain lines."""


class PlainWatcher:
    """Now and then a line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Remaining()
        self._last = float("-inf")

    def cell(self, done: int, total: int, what: str) -> None:
        """A cell begins."""
        left = self._clock.left(done, total)
        if time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            text = f"measured {done} of {total}{left}; now {what}"
            self._console.print(
                clean(text), markup=False, highlight=False, soft_wrap=True
            )


class BarWatcher:
    """A bar."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._clock = Remaining()

    def cell(self, done: int, total: int, what: str) -> None:
        """A cell begins."""
        self._progress.update(
            self._task,
            completed=done,
            total=total,
            description=what,
            left=self._clock.left(done, total).removeprefix(", "),
        )


class Remaining:
    """Cells take about the same time; those of earlier commands do not count."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def left(self, done: int, total: int) -> str:
        """`, 1:05 left`; empty as long as nothing is known."""
        if self._start is None:
            self._start = time.monotonic(), done
            return ""
        began, before = self._start
        seconds = (time.monotonic() - began) / (done - before) * (total - done)
        return f", {int(seconds) // 60}:{int(seconds) % 60:02} left"


@contextmanager
def make_watcher() -> Iterator[Watcher]:
    """What suits stderr; NO_COLOR is honoured."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainWatcher(console)
        return
    columns = (
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.description}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield BarWatcher(progress, progress.add_task("starting", total=1, left=""))


def table(points: list[dict[str, Any]]) -> Table:
    """Every point; intervals are 95%."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("kind")
    for name in (
        *("batch", "workers", "samples/s", "speed-up", "95%", "efficiency"),
        *("limit", "of limit", "exchange", "waiting"),
    ):
        shown.add_column(name, justify="right")
    for point in points:
        shown.add_row(*_cells(point))
    return shown


def _cells(point: dict[str, Any]) -> list[str]:
    phases = point["seconds_by_phase"]
    total = sum(phases.values()) or 1.0
    interval = "-"
    if point["speedup"] is not None:
        interval = f"{point['speedup_low']:.2f}-{point['speedup_high']:.2f}"
    return [
        point["kind"],
        str(point["global_batch"]),
        str(point["workers"]),
        f"{point['samples_per_second']:,.0f}",
        _number(point["speedup"], ".2f"),
        interval,
        _number(point["efficiency"], ".0%"),
        _number(point["limit_speedup"], ".2f"),
        _number(point["efficiency_of_limit"], ".0%"),
        f"{phases.get('exchange', 0.0) / total:.0%}",
        f"{phases.get('wait', 0.0) / total:.0%}",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
