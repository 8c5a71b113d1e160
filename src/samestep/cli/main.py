"""The command line: thin, and free of slow imports until a command needs them."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from samestep.cli import exit_codes
from samestep.cli.audit import audit
from samestep.cli.chaos import chaos
from samestep.cli.check import check
from samestep.cli.doctor import doctor
from samestep.cli.models import export, sample
from samestep.cli.options import (
    device_option,
    nodes_options,
    resume_options,
    train_options,
    user_code_options,
    wants_several_machines,
    workers_option,
)
from samestep.cli.report import report
from samestep.cli.scale import scale
from samestep.errors import UsageError
from samestep.system.terminal import echo, echo_row


if TYPE_CHECKING:
    from samestep.api.run import Run
    from samestep.config.placement import Placement
    from samestep.config.recipe import Recipe
    from samestep.supervisor.forkserver_client import ForkServer

STARTED = time.monotonic()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="samestep")
def cli() -> None:
    """Train neural networks data-parallel: the same bits at any number of workers.

    \b
    Examples:
      samestep train                             the default recipe on all cores
      samestep train mnist-mlp-classic --workers 2
      samestep resume runs/a                     continue where it stopped
      samestep compare runs/a runs/b             are the weights identical?
      samestep recipes                           list the built-in recipes
      samestep scale                             would more workers help?
    """


@cli.command()
@click.argument("recipe", required=False)
@train_options
@click.option(
    "--find-lr",
    is_flag=True,
    help="Instead of training, try 100 steps with a learning rate that grows from 1e-7 "
    "to 10, suggest one, and write the losses to lr-range.csv and lr-range.svg.",
)
@nodes_options
def train(
    recipe: str | None,
    callbacks: tuple[str, ...],
    trackers: tuple[str, ...],
    with_report: bool,
    find_lr: bool,
    **options: Any,
) -> None:
    """Train RECIPE: a built-in recipe's name or a TOML file; default mnist-mlp.

    With --model or --data and no RECIPE, the recipe is called `own`: 3 epochs, global
    batch 64, 8 micro-batches, Adam at 0.001, unless options say otherwise.

    \b
    Examples:
      samestep train
      samestep train mnist-mlp-classic --epochs 1 --micro-batches 8 --workers 4
      samestep train --set optimizer.lr=0.003 --set model.hidden=[256,128]
      samestep train runs/mnist-mlp-20260101T000000Z/recipe.toml     once more
      samestep train --model mine:build --data mine:load             your own code
      samestep train --nodes 2 --rdzv-endpoint 10.0.0.1:29400 \\
          --interface 10.0.0.0/24 --out runs/both      the same on both machines
    """
    is_spread = wants_several_machines(options)
    if find_lr and (is_spread or callbacks or trackers):
        raise UsageError(
            "`--find-lr` keeps no run, and needs one machine only: leave out "
            "`--nodes`, `--callback` and `--tracker`."
        )
    if is_spread:
        from samestep.elastic import nodes
        from samestep.user_code.arguments import requested

        asked, _ = requested(recipe, options)
        nodes.run(options["out"], asked)
        return
    from samestep.supervisor.forkserver_client import ForkServer

    with ForkServer() as server:  # imports torch in another process meanwhile
        from samestep.api import train
        from samestep.config.placement import Placement
        from samestep.user_code.arguments import requested

        asked, parts = requested(recipe, options)
        if find_lr:
            _find_lr(asked, parts, Placement.model_validate(options), server)
            return
        run = train.train(
            asked,
            Placement.model_validate(options),
            **parts,
            trackers=trackers,
            callbacks=callbacks,
            server=server,
            started=STARTED,
        )
        _print_summary(run, with_report)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@resume_options
@click.option("--max-steps", type=int, help="Total number of optimizer steps.")
@nodes_options
def resume(
    run: Path,
    epochs: int | None,
    max_steps: int | None,
    allow_different_numerics: bool,
    callbacks: tuple[str, ...],
    trackers: tuple[str, ...],
    with_report: bool,
    **options: Any,
) -> None:
    """Continue RUN from its newest checkpoint, with any number of workers.

    \b
    Examples:
      samestep resume runs/mnist-mlp-20260101T000000Z
      samestep resume runs/mine --workers 4 --exchange gloo
      samestep resume runs/mine --epochs 10     if the schedule allows more epochs
    """
    if wants_several_machines(options):
        from samestep.elastic import nodes

        if max_steps is not None:
            raise UsageError(
                "One machine alone gives a run more steps: resume it there with "
                "`--max-steps`, and leave out `--nodes`."
            )
        nodes.run(run, None)
        return
    from samestep.supervisor.forkserver_client import ForkServer

    with ForkServer() as server:
        from samestep.api import train
        from samestep.config.placement import Placement
        from samestep.user_code.arguments import parts_of

        parts = parts_of(options)
        resumed = train.resume(
            run,
            Placement.model_validate(options),
            epochs=epochs,
            max_steps=max_steps,
            allow_different_numerics=allow_different_numerics,
            **parts,
            trackers=trackers,
            callbacks=callbacks,
            server=server,
            started=STARTED,
        )
        _print_summary(resumed, with_report)


@cli.command()
@click.argument("run_or_model", type=click.Path(path_type=Path))
@workers_option
@device_option
@click.option(
    "--split",
    type=click.Choice(["test", "validation", "train"]),
    default="test",
    help="Samples to evaluate on.",
)
@user_code_options
def evaluate(
    run_or_model: Path, workers: int | str, device: str, split: str, **parts: Any
) -> None:
    """Measure the weights of a run directory or of a model file.

    \b
    Examples:
      samestep evaluate runs/mnist-mlp-20260101T000000Z
      samestep evaluate model.safetensors --split validation --workers 2
    """
    from samestep.supervisor.forkserver_client import ForkServer

    with ForkServer() as server:
        from samestep.api import evaluate
        from samestep.config.placement import Placement
        from samestep.output.sentences import scores

        evaluation = evaluate.evaluate(
            run_or_model,
            Placement.model_validate({"workers": workers, "device": device}),
            split=split,
            server=server,
            **parts,
        )
        record = {**evaluation.means, "own_metrics": evaluation.own_metrics}
        means = scores(record, "", "  ", 6)
        echo_row(split, f"{means}  ({evaluation.targets:,} targets)")
        echo_row("weights", f"sha256 {evaluation.weights_sha256}")


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
def compare(run_a: Path, run_b: Path) -> None:
    """Compare the weights of two runs. Exit code 0 if they are identical, else 1.

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
@click.argument("name", required=False)
@click.option(
    "--fingerprint", is_flag=True, help="Print the SHA-256 that NAME's weights have."
)
def recipes(name: str | None, fingerprint: bool) -> None:
    """List the built-in recipes, or print NAME with all its fields as TOML.

    \b
    Examples:
      samestep recipes
      samestep recipes mnist-mlp > mine.toml
      samestep recipes mnist-mlp --fingerprint
    """
    from samestep.config.recipe import Recipe, built_in_recipes

    if fingerprint:
        from samestep.config import published
        from samestep.kernels.interface import ARITHMETIC

        if name is None:
            raise click.UsageError("--fingerprint needs the NAME of a recipe.")
        echo(published.of_built_in(name, ARITHMETIC))
        return
    if name:
        echo(Recipe.load(name).to_toml(), nl=False)
        return
    for known in built_in_recipes():
        recipe = Recipe.load(known)
        echo(
            f"{known:<20} {recipe.epochs} epochs, global batch {recipe.global_batch} "
            f"in {recipe.micro_batches} micro-batches, {recipe.optimizer.name}"
        )


for _command in (audit, chaos, check, doctor, export, report, sample, scale):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command `samestep`."""
    exit_codes.run(cli)


def _find_lr(
    asked: "Recipe", parts: dict[str, Any], placement: "Placement", server: "ForkServer"
) -> None:
    """Print the result of a learning-rate range test."""
    from samestep.api import find_lr

    find_lr.check_new(placement.out)
    parts.pop("schedule", None)  # the test has its own
    test = find_lr.find_lr(asked, placement, **parts, server=server)
    paths = test.write(placement.out, asked.name)
    suggestion = test.suggestion
    if suggestion is None:
        echo_row("suggestion", "none: the loss falls at no rate that was tried")
    else:
        lr = f"{suggestion:.3g}"
        echo_row("suggestion", f"{lr}: there the smoothed loss falls fastest")
        echo_row("to use it", f"--set optimizer.lr={lr}")
    echo_row("steps", f"{len(test.losses)}, from {test.rates[0]:.3g} on")
    for path in paths:
        echo_row("written", path)


def _print_summary(run: "Run", with_report: bool) -> None:
    from samestep.output.summary import summary
    from samestep.report import try_to_write

    echo(summary(run))
    if with_report:
        try_to_write(run.path)
