"""`samestep scale` as a function: measurements, analysis, files."""

from datetime import UTC, datetime
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.data.sources import source_of
from samestep.output.schema import Analysis
from samestep.report import try_to_write
from samestep.scaling.analysis import analyse
from samestep.scaling.grid import Settings, grid
from samestep.scaling.measure import OnCell, measure
from samestep.scaling.study import open_study, to_csv, write
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import machine
from samestep.system.log import logger
from samestep.system.signals import stop_on_signals


def scale(
    recipe: Recipe,
    settings: Settings,
    server: ForkServer,
    on_cell: OnCell,
    out: Path | None = None,
) -> tuple[Path, Analysis]:
    """Measure, analyse and write; return the directory and the analysis.

    Continues in `out` if it holds an unfinished study with these settings. Raises
    UsageError before anything is started, TrainingError after, and Interrupted after a
    signal.
    """
    source = source_of(recipe.data)
    if notice := source.prepare():
        logger.info("note: %s", notice)
    environment = machine.describe() | {"data": source.describe()}
    path = out or _default_path(recipe)
    points = grid(settings, recipe.micro_batches)
    with open_study(path, recipe, environment, settings, points) as study:
        with stop_on_signals() as stop:
            measure(study, server, stop, on_cell)
        analysis = analyse(study, machine.usable_cores()[0])
        write(path / "scaling.csv", to_csv(analysis.points))
        study.save(analysis)
    try_to_write(path, png=True)
    return path, analysis


def _default_path(recipe: Recipe) -> Path:
    return Path("runs") / f"scale-{recipe.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
