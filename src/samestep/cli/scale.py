"""The command `samestep scale`; imports nothing slow until it runs."""

from pathlib import Path
from typing import Any

import click

from samestep.cli.options import set_option


@click.command()
@click.argument("recipe", default="mnist-mlp")
@click.option(
    "--workers",
    metavar="N,N,...",
    help="Worker counts to measure; default: 1 up to the cores that may be used.",
)
@click.option(
    "--global-batch",
    metavar="N,N,...",
    help="Global batches to measure; default: the recipe's.",
)
@click.option(
    "--weak",
    is_flag=True,
    help="Also let the global batch and its micro-batches grow with the workers.",
)
@click.option(
    "--exchange",
    type=click.Choice(["auto", "shared", "gloo"]),
    default="auto",
    help="How gradients are summed; auto: in shared memory if possible.",
)
@click.option(
    "--nodes-up-to",
    type=click.IntRange(2),
    help="Predict for up to this many nodes like this machine.",
)
@click.option(
    "--bandwidth", metavar="10Gbit", help="Bandwidth of the network between nodes."
)
@click.option("--latency", metavar="50us", help="Latency of the network between nodes.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Measurements of every point.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Seconds of training per measurement, after a warm-up.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory; default: runs/scale-<recipe>-<UTC time>. An unfinished one of the "
    "same settings is continued.",
)
@set_option
def scale(
    recipe: str, assignments: tuple[str, ...], out: Path | None, **options: Any
) -> None:
    """Measure how RECIPE scales on this machine, and predict how it would elsewhere.

    Runs short trainings with each number of workers, interleaved and repeated. Fits a
    model of the time of a step, checks it on a worker count that it has not seen, and
    prints predictions with confidence intervals, and advice.

    \b
    Examples:
      samestep scale
      samestep scale mnist-mlp-classic --workers 1,2,4,8 --set micro_batches=8
      samestep scale --global-batch 64,256,1024 --weak
      samestep scale --nodes-up-to 64 --bandwidth 10Gbit --latency 50us
      samestep scale --out runs/scale-1      continues if it was stopped
    """
    from samestep.supervisor.forkserver_client import ForkServer
    from samestep.system.terminal import echo

    with ForkServer() as server:  # imports torch in another process meanwhile
        from rich.console import Console

        from samestep.config.recipe import Recipe, parse_override
        from samestep.scaling import grid, progress, scale
        from samestep.system import machine

        loaded = Recipe.load(recipe, dict(map(parse_override, assignments)))
        settings = grid.from_options(loaded, machine.usable_cores()[0], **options)
        with progress.show_progress() as on_cell:
            path, analysis = scale.scale(loaded, settings, server, on_cell, out)
    Console(width=None if Console().is_terminal else 120).print(
        progress.table(analysis.points)
    )
    echo("\n" + "\n".join(analysis.advice) + f"\n\nscaling     {path}")
