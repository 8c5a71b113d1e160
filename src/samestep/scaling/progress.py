"""What `samestep scale` prints: progress on stderr, the table at the end on stdout."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from samestep.output.schema import Point
from samestep.scaling.measure import OnCell
from samestep.system.log import logger, shown_on_stderr


PLAIN_SECONDS = 10.0
"""Seconds between two plain lines, at least."""
COLUMNS = (
    "batch",
    "workers",
    "samples/s",
    "speed-up",
    "95%",
    "efficiency",
    "limit",
    "of limit",
    "exchange",
    "waiting",
)


@contextmanager
def show_progress() -> Iterator[OnCell]:
    """Yield a callback that shows a bar on a terminal, and lines elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        with shown_on_stderr():
            yield _Lines()
        return
    description = TextColumn("{task.description}")
    columns = (BarColumn(), MofNCompleteColumn(), description, TimeRemainingColumn())
    with Progress(
        *columns,
        console=console,
        transient=True,
        speed_estimate_period=math.inf,  # a measurement may take minutes
    ) as progress:

        def on_cell(done: int, total: int, what: str) -> None:
            if not progress.tasks:
                progress.add_task(what, total=total, completed=done)
            progress.update(progress.task_ids[0], completed=done, description=what)

        yield on_cell


class _Lines:
    """Logs a line every few seconds."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._begun: tuple[float, int] | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        began, before = self._begun = self._begun or (now, done)
        if now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        left = ""
        if done > before:  # cells of earlier commands do not count
            seconds = int((now - began) / (done - before) * (total - done))
            left = f", {seconds // 60}:{seconds % 60:02} left"
        logger.info("measured %s of %s%s; now %s", done, total, left, what)


def table(points: list[Point]) -> Table:
    """Return the table of all points; intervals are 95%."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("kind")
    for name in COLUMNS:
        shown.add_column(name, justify="right")
    for point in points:
        shown.add_row(*_cells(point))
    return shown


def _cells(point: Point) -> list[str]:
    phases = point.seconds_by_phase
    total = sum(phases.values()) or 1.0
    interval = "-"
    if point.speedup is not None:
        interval = f"{point.speedup_low:.2f}-{point.speedup_high:.2f}"
    return [
        point.kind,
        str(point.global_batch),
        str(point.workers),
        f"{point.samples_per_second:,.0f}",
        _number(point.speedup, ".2f"),
        interval,
        _number(point.efficiency, ".0%"),
        _number(point.limit_speedup, ".2f"),
        _number(point.efficiency_of_limit, ".0%"),
        f"{phases.get('exchange', 0.0) / total:.0%}",
        f"{phases.get('wait', 0.0) / total:.0%}",
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
