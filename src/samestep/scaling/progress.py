"""What `samestep scale` prints: progress on stderr, the table at the end on stdout."""

import math
import time
from collections.abc import Callable, Iterator
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
COLUMNS: dict[str, Callable[[Point], str]] = {
    "kind": lambda p: p.kind,
    "batch": lambda p: str(p.global_batch),
    "workers": lambda p: str(p.workers),
    "samples/s": lambda p: f"{p.samples_per_second:,.0f}",
    "speed-up": lambda p: _number(p.speedup, ".2f"),
    "95%": lambda p: f"{p.speedup_low:.2f}-{p.speedup_high:.2f}" if p.speedup else "-",
    "efficiency": lambda p: _number(p.efficiency, ".0%"),
    "limit": lambda p: _number(p.limit_speedup, ".2f"),
    "of limit": lambda p: _number(p.efficiency_of_limit, ".0%"),
    "exchange": lambda p: f"{p.share('exchange'):.0%}",
    "waiting": lambda p: f"{p.share('wait'):.0%}",
}


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
    for name in COLUMNS:
        shown.add_column(name, justify="left" if name == "kind" else "right")
    for point in points:
        shown.add_row(*(cell(point) for cell in COLUMNS.values()))
    return shown


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
