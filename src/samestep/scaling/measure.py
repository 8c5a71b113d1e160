"""The measurements themselves: one cell is one point in one round."""

import statistics
from collections.abc import Callable

from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.document.formatting import plural
from samestep.errors import Interrupted
from samestep.messages.job import MeasurementJob, Setup
from samestep.messages.training import Measured, Message, Ready, WorkersStarted
from samestep.scaling.grid import Point, schedule
from samestep.scaling.study import Measurement, Study
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import run_workers
from samestep.system import shared_memory
from samestep.system.signals import Stop


WARM_UP_SECONDS = 0.3

OnStart = Callable[[list[int]], None]
"""Receives the workers' process ids when they are ready, before they warm up."""
OnCell = Callable[[int, int, str], None]
"""Receives how many cells are done, of how many, and the cell that begins."""


def measure(
    study: Study,
    server: ForkServer,
    stop: Stop,
    on_cell: OnCell,
    warm_up: float = WARM_UP_SECONDS,
    on_start: OnStart = lambda _: None,
) -> None:
    """Measure every missing cell; each is on disk before the next one begins.

    Raises TrainingError, and Interrupted after a signal.
    """
    cells = list(schedule(list(study.runs), study.settings.rounds))
    for index, (round_, point) in enumerate(cells):
        if any(run.round == round_ for run in study.runs[point]):
            continue
        on_cell(index, len(cells), describe(point))
        reports = run_cell(study, server, stop, point, warm_up, on_start)
        if stop.number is not None:
            raise Interrupted(
                f"stopped after {index} of {len(cells)} measurements; the same command "
                f"with `--out {study.path}` continues",
                stop.exit_code,
            )
        study.gradient_bytes = reports[0].gradient_bytes
        study.add(point, combine(round_, reports))
        study.save()


def describe(point: Point) -> str:
    """Return `2 workers, global batch 64` and what is special about the point."""
    workers = plural(point.workers, "worker")
    special = {"limit": " without exchange", "calibration": ", small micro-batches"}
    return f"{workers}{special.get(point.kind, '')}, global batch {point.global_batch}"


def run_cell(
    study: Study,
    server: ForkServer,
    stop: Stop,
    point: Point,
    warm_up: float,
    on_start: OnStart,
) -> list[Measured]:
    """Run the workers of a point; return the reports of its trainings."""
    reports: list[Measured] = []
    pids: list[int] = []
    ready: list[Ready] = []

    def listen(message: Message) -> None:
        match message:
            case WorkersStarted():
                pids.extend(message.pids)
            case Ready():
                ready.append(message)
                if len(ready) == point.workers:
                    on_start(pids)
            case Measured():
                reports.append(message)

    size = 8 * point.workers if point.kind == "limit" else 0
    with shared_memory.temporary(size) as fd:
        job = MeasurementJob(
            setup=cell_setup(study.recipe, point, study.settings.exchange),
            warm_up=warm_up,
            seconds=study.settings.seconds_per_run,
            is_independent=point.kind == "limit",
        )
        logs = study.path / "logs"
        run_workers(server, job, point.workers, logs, listen, stop, {"snapshots": fd})
    return reports


def cell_setup(recipe: Recipe, point: Point, exchange: str) -> Setup:
    """Return what fixes the point; shares are even, and nothing is rebalanced."""
    sizes = {"global_batch": point.global_batch, "micro_batches": point.micro_batches}
    # Rebalancing and snapshots would disturb what is measured.
    undisturbed = {"balance": "off", "snapshot_seconds": 0.0}
    placement = Placement.model_validate(
        {"workers": point.workers, "exchange": exchange, **undisturbed}
    )
    return make_setup(recipe.model_copy(update=sizes), placement)


def combine(round_: int, reports: list[Measured]) -> Measurement:
    """Return one measurement of trainings that ran at the same time."""
    scales = [r.noise_scale for r in reports if r.noise_scale is not None]
    return Measurement(
        round=round_,
        steps=round(statistics.fmean(r.steps for r in reports)),
        seconds=max(r.seconds for r in reports),
        samples_per_second=sum(r.samples / r.seconds for r in reports),
        step_seconds_sd=statistics.fmean(r.step_seconds_sd for r in reports),
        workers=[worker for r in reports for worker in r.workers],
        bytes_per_step=sum(r.bytes_per_step for r in reports),
        add_seconds=statistics.median(r.add_seconds for r in reports),
        noise_scale=scales[0] if scales else None,
    )
