"""The command line: thin, and free of slow imports until a command needs them."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from samestep.cli import exit_codes
from samestep.cli.check import check
from samestep.cli.doctor import doctor
from samestep.cli.models import export, sample
from samestep.cli.options import (
    are_nodes_asked_for,
    device_option,
    nodes_options,
    own_options,
    placement_options,
    recipe_options,
    report_option,
    tracker_option,
    workers_option,
)
from samestep.cli.report import report
from samestep.cli.scale import scale
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.terminal import echo


if TYPE_CHECKING:
    from samestep.api.run import Run

STARTED = time.monotonic()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="samestep")
def cli() -> None:
    """Train neural networks data-parallel: the same bits at any number of workers.

    \b
    Examples:
      samestep train                             the default recipe on all cores
      samestep train mnist-mlp-classic --workers 2
      samestep resume runs/a                     go on where it stopped
      samestep compare runs/a runs/b             are the weights identical?
      samestep recipes                           what can be trained
      samestep scale                             would more workers help?
    """


cli.add_command(scale)


@cli.command()
@click.argument("recipe", required=False)
@placement_options
@recipe_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory; default: runs/<recipe>-<UTC time>.",
)
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="a.b=value",
    help="Any other recipe field; repeatable.",
)
@own_options
@tracker_option
@report_option
@nodes_options
def train(
    recipe: str | None,
    trackers: tuple[str, ...],
    with_report: bool,
    nodes: str | None,
    endpoint: str | None,
    rdzv_id: str | None,
    interface: str | None,
    **options: Any,
) -> None:
    """Train RECIPE: a built-in recipe's name or a TOML file; default mnist-mlp.

    With --model or --data and no RECIPE, it is your own, and called `own`: 3 epochs,
    global batch 64, 8 micro-batches, Adam at 0.001, unless you say otherwise.

    \b
    Examples:
      samestep train
      samestep train mnist-mlp-classic --epochs 1 --micro-batches 8 --workers 4
      samestep train --set optimizer.lr=0.003 --set model.hidden=[256,128]
      samestep train runs/mnist-mlp-20260101T000000Z/recipe.toml     once more
      samestep train --model mine:build --data mine:load             your own code
      samestep train --nodes 2 --endpoint 10.0.0.1:29400 --interface 10.0.0.0/24 \\
          --out runs/both                      the same on each of two machines
    """
    if are_nodes_asked_for(nodes, endpoint, interface, rdzv_id):
        from samestep.elastic import nodes as machines
        from samestep.user_code.arguments import requested

        asked, _ = requested(recipe, dict(options))
        machines.run(options["out"], asked)
        return
    with ForkServer() as server:  # torch is imported there while we go on here
        from samestep.api import train
        from samestep.config.placement import Placement
        from samestep.user_code.arguments import requested

        asked, parts = requested(recipe, options)
        run = train.train(
            asked,
            Placement.model_validate(options),
            model=parts.get("model"),
            data=parts.get("data"),
            loss=parts.get("loss"),
            trackers=trackers,
            server=server,
            started=STARTED,
        )
        _tell(run, with_report)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@placement_options
@click.option("--epochs", type=int, help="Train for so many epochs in all.")
@click.option(
    "--accept-other-bits",
    is_flag=True,
    help="Go on even if recipe, code, torch, instruction set or device have changed.",
)
@own_options
@tracker_option
@report_option
@nodes_options
def resume(
    run: Path,
    epochs: int | None,
    accept_other_bits: bool,
    trackers: tuple[str, ...],
    model: str | None,
    data: str | None,
    loss: str | None,
    with_report: bool,
    nodes: str | None,
    endpoint: str | None,
    rdzv_id: str | None,
    interface: str | None,
    **placed: Any,
) -> None:
    """Go on with RUN from its newest checkpoint, with any number of workers.

    \b
    Examples:
      samestep resume runs/mnist-mlp-20260101T000000Z
      samestep resume runs/mine --workers 4 --exchange gloo
      samestep resume runs/mine --epochs 10     if the schedule allows more epochs
    """
    if are_nodes_asked_for(nodes, endpoint, interface, rdzv_id):
        from samestep.elastic import nodes as machines

        machines.run(run, None)
        return
    with ForkServer() as server:
        from samestep.api import train
        from samestep.config.placement import Placement

        resumed = train.resume(
            run,
            Placement.model_validate(placed),
            epochs=epochs,
            accept_other_bits=accept_other_bits,
            model=model,
            data=data,
            loss=loss,
            trackers=trackers,
            server=server,
            started=STARTED,
        )
        _tell(resumed, with_report)


@cli.command()
@click.argument("run_or_model", type=click.Path(path_type=Path))
@workers_option
@device_option
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "train"]),
    default="test",
    help="Which samples.",
)
@own_options
def evaluate(
    run_or_model: Path,
    workers: int | str,
    device: str,
    split: str,
    model: str | None,
    data: str | None,
    loss: str | None,
) -> None:
    """Measure the weights of a run directory or of a model file.

    \b
    Examples:
      samestep evaluate runs/mnist-mlp-20260101T000000Z
      samestep evaluate model.safetensors --split validation --workers 2
    """
    with ForkServer() as server:
        from samestep.api import train
        from samestep.config.placement import Placement
        from samestep.output.console import scores

        where = {"workers": workers, "device": device}
        placement = Placement.model_validate(where)
        found = train.evaluate(
            run_or_model,
            placement,
            split=split,
            model=model,
            data=data,
            loss=loss,
            server=server,
        )
        shown = {**found.means, "own_metrics": found.own_metrics}
        echo(
            f"{split:<12}{scores(shown, '', '  ', 6)}  "
            f"({found.targets:,} targets)\nweights     sha256 {found.weights_sha256}"
        )


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
def compare(run_a: Path, run_b: Path) -> None:
    """Are the weights of two runs identical? Exit code 0 if so, else 1.

    \b
    Example:
      samestep compare runs/one-worker runs/two-workers
    """
    from samestep.api.run import Run
    from samestep.output.run import first_difference

    difference = first_difference(Run.open(run_a), Run.open(run_b))
    echo(difference or "identical")
    sys.exit(1 if difference else 0)


@cli.command()
@click.argument("recipe", default="mnist-mlp")
@click.option(
    "--kills",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="How many workers to kill; the other faults come on top.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the faults.")
@click.option(
    "--faults",
    default="kill,stop,exception,crash,corrupt,diskfull",
    show_default=True,
    help="Which kinds, separated by commas.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Of each training.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory for the trainings; default: runs/chaos-<UTC time>.",
)
@click.option(
    "--set", "assignments", multiple=True, metavar="a.b=value", help="A recipe field."
)
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

    Ten kills at a time hit one training: at random times and at named points. Besides
    them, for every five kills there is one fault of each other kind: a worker is
    stopped or raises an exception, the whole run crashes, a checkpoint is damaged, the
    disk is full.

    \b
    Examples:
      samestep chaos
      samestep chaos --kills 50 --seed 7
      samestep chaos --kills 5 --faults kill --workers 3
      samestep chaos --kills 20 --faults crash
    """
    from rich.console import Console

    from samestep.cli import chaos as chaos_
    from samestep.config.recipe import Recipe, parse_override

    loaded = Recipe.load(recipe, dict(map(parse_override, assignments)))
    report = chaos_.run_chaos(loaded, kills, seed, faults.split(","), workers, out)
    Console().print(report.table)
    echo(report.summary)
    sys.exit(0 if report.is_identical else 1)


@cli.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the built-in recipes, or print NAME with all its fields as TOML.

    \b
    Examples:
      samestep recipes
      samestep recipes mnist-mlp > mine.toml
    """
    from samestep.config.recipe import Recipe, built_in_recipes

    if name:
        echo(Recipe.load(name).to_toml(), nl=False)
        return
    for known in built_in_recipes():
        recipe = Recipe.load(known)
        echo(
            f"{known:<20} {recipe.epochs} epochs, global batch {recipe.global_batch} "
            f"in {recipe.micro_batches} micro-batches, {recipe.optimizer.name}"
        )


cli.add_command(sample)
cli.add_command(export)
cli.add_command(check)
cli.add_command(report)
cli.add_command(doctor)


def main() -> NoReturn:
    """The command `samestep`."""
    exit_codes.run(cli)


def _tell(run: "Run", with_report: bool) -> None:
    from samestep.output.summary import summary
    from samestep.report import try_to_write

    echo(summary(run))
    if with_report:
        try_to_write(run.path, lambda text: echo(text, err=True))
