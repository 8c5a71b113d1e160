"""Find a learning rate: a range test (`core.lr_range`), which keeps no run."""

import csv
import io
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from samestep.api.resolving import resolved
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.core import lr_range
from samestep.core.lr_range import LrRange
from samestep.errors import Interrupted, NonFiniteLoss, RunError, UsageError
from samestep.files import atomic
from samestep.messages.job import TrainingJob
from samestep.messages.training import LrTried, Message
from samestep.output.logs import temporary_logs
from samestep.output.run_writer import new_directory
from samestep.supervisor.forkserver_client import ForkServer, given_or_new
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import run_workers
from samestep.system import shared_memory
from samestep.system.signals import Stop, stop_on_signals
from samestep.user_code.arguments import (
    Part,
    batch_of,
    packed,
    placement_of,
    recipe_of,
    split_fields,
    split_parts,
)
from samestep.user_code.references import Given


START, END, STEPS = 1e-7, 10.0, 100
"""The range of fastai."""


class _Over(Exception):
    """The test has seen enough."""


@dataclass
class LrTest:
    """The losses of a range test, at one learning rate after the other."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def smoothed(self) -> list[float]:
        """The smoothed losses."""
        return lr_range.smoothed(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The rate where the smoothed loss falls fastest; None if it never falls."""
        index = lr_range.steepest(self.smoothed)
        return None if index is None else self.rates[index]

    def add(self, rate: float, loss: float) -> None:
        """Add a step."""
        self.rates.append(rate)
        self.losses.append(loss)

    def write(self, out: Path | None, name: str) -> list[Path]:
        """Write lr-range.csv, and lr-range.svg if matplotlib is there; return paths.

        They are in a new directory: `out`, or one for the recipe's `name` below runs/.
        Raises RunError if it exists.
        """
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["step", "lr", "loss", "smoothed"])
        smooth = self.smoothed
        steps = range(1, len(smooth) + 1)
        rows.writerows(zip(steps, self.rates, self.losses, smooth, strict=True))
        files = {"lr-range.csv": table.getvalue()}
        if find_spec("matplotlib"):
            from samestep.report import lr_range_plot

            files["lr-range.svg"] = lr_range_plot.svg(
                self.rates, self.losses, smooth, self.suggestion
            )
        directory = new_directory(out, f"{name}-lr-range")
        for file, content in files.items():
            atomic.write(directory / file, content.encode())
        return [directory / file for file in files]


def check_new(out: Path | None) -> None:
    """Raise RunError, before a test, if its directory exists."""
    if out is not None and out.exists():
        raise RunError(
            f"A range test never overwrites anything, and {out} exists. Choose another "
            "directory with `--out`."
        )


def find_lr(
    recipe: Recipe | str | Path | None = None,
    placement: Placement | None = None,
    *,
    start: float = START,
    end: float = END,
    steps: int = STEPS,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    server: ForkServer | None = None,
    **fields: Any,
) -> LrTest:
    """Train some steps of a recipe with a growing learning rate; return the losses.

    The rate grows exponentially from `start` to `end` in `steps` steps, instead of the
    recipe's schedule. The test ends early once the loss diverges. The other arguments
    are those of `train`. The losses, and so the suggestion, are the same at any number
    of workers. No file is written. Raises like `train`.
    """
    if not 0 < start < end or steps < 2:
        raise UsageError(
            "A range test has at least 2 steps, from a positive learning rate to a "
            f"larger one; received {steps} from {start} to {end}."
        )
    parts, sections = split_parts(model, data, loss, optimizer, None)
    changed, placed = split_fields(batch_of(recipe, data) | fields | sections)
    placement = placement_of(placement, placed)
    with given_or_new(server) as running, packed(parts) as (names, given):
        asked = recipe_of(recipe, names, changed)
        tried = asked.changed(
            {
                "max_steps": steps,
                "early_stopping": None,
                "evaluation_steps": None,
                "schedule": {"name": "constant"},
            }
        )
        tried, placement, *_ = resolved(tried, placement, names, running.gpus)
        rates = LrRange.between(start, end, steps)
        return _run(tried, placement, rates, running, given)


def _run(
    recipe: Recipe,
    placement: Placement,
    rates: LrRange,
    server: ForkServer,
    given: Given,
) -> LrTest:
    test = LrTest()

    def listen(message: Message) -> None:
        # Workers go on until they are ended, and what they have sent comes here, too.
        if isinstance(message, LrTried) and not _is_over(test, rates):
            test.add(message.lr, message.loss)
            if _is_over(test, rates):
                raise _Over

    setup = replace(
        make_setup(recipe, placement, given),
        lr_range=[rates.start, rates.factor, rates.steps],
        snapshot_seconds=0.0,
        probe=False,
        profile=0,
    )
    with (
        stop_on_signals() as stop,
        shared_memory.temporary() as fd,
        temporary_logs() as logs,
    ):
        memories = {**given.memories, "snapshots": fd}
        job, workers = TrainingJob(setup=setup), placement.num_workers
        try:
            run_workers(server, job, workers, logs, listen, stop, memories)
        except (_Over, NonFiniteLoss):
            return test
        _check_stop(stop)
    return test


def _is_over(test: LrTest, rates: LrRange) -> bool:
    losses = test.losses
    has_diverged = bool(losses) and lr_range.has_diverged(test.smoothed)
    return has_diverged or len(losses) == rates.steps


def _check_stop(stop: Stop) -> None:
    """Raise Interrupted after a signal."""
    if stop.number is not None:
        raise Interrupted("stopped; a range test keeps nothing", stop.exit_code)
