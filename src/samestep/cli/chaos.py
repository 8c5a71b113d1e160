"""The command `samestep chaos`; imports little until it runs."""

import sys
from pathlib import Path

import click

from samestep.cli.options import set_option
from samestep.system.terminal import echo


@click.command()
@click.argument("recipe", default="mnist-mlp")
@click.option(
    "--kills",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Number of workers to kill; the other faults come on top.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the fault schedule."
)
@click.option(
    "--faults",
    default="kill,stop,exception,crash,corrupt,diskfull",
    show_default=True,
    help="Kinds of faults, separated by commas.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Workers per training.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory for the trainings; default: runs/chaos-<UTC time>.",
)
@set_option
def chaos(
    recipe: str,
    kills: int,
    seed: int,
    faults: str,
    workers: int,
    out: Path | None,
    assignments: tuple[str, ...],
) -> None:
    """Train RECIPE undisturbed, then under faults; exit code 1 if the weights differ.

    Each disturbed training gets up to ten kills, at random times and at named points.
    For every five kills there is also one fault of each other kind: a worker is stopped
    or raises an exception, the whole run crashes, a checkpoint is damaged, the disk is
    full.

    \b
    Examples:
      samestep chaos
      samestep chaos --kills 50 --seed 7
      samestep chaos --kills 5 --faults kill --workers 3
      samestep chaos --kills 20 --faults crash
    """
    from rich.console import Console

    from samestep.chaos.run import run_chaos
    from samestep.config.recipe import Recipe, parse_override

    loaded = Recipe.load(recipe, dict(map(parse_override, assignments)))
    report = run_chaos(loaded, kills, seed, faults.split(","), workers, out)
    Console().print(report.table)
    echo(report.summary)
    sys.exit(0 if report.is_identical else 1)
