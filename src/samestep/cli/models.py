"""The commands that use a trained model: `sample` and `export`."""

from pathlib import Path
from typing import Any

import click

from samestep.cli.options import model_and_data_options
from samestep.system.terminal import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="\n", help="Beginning of the text.")
@click.option(
    "--length",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Characters to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.8,
    show_default=True,
    help="0: always the likeliest character; higher: more random.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the sampling."
)
def sample(run: Path, prompt: str, **options: Any) -> None:
    """Generate text with the model of RUN, which was trained on text.

    \b
    Example:
      samestep sample runs/chars-transformer-20260101T000000Z --prompt "def "
    """
    from samestep.api import sample
    from samestep.api.run import Run

    echo(sample.sample(Run.open(run), prompt, **options))


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "state_dict", "onnx"]),
    default="safetensors",
    show_default=True,
    help="ONNX needs `samestep[export]`.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A new file; default: RUN/exported.safetensors, .pt or .onnx.",
)
@model_and_data_options
def export(
    run: Path, form: str, out: Path | None, model: str | None, data: str | None
) -> None:
    """Write the model of RUN for other programs, and check that it predicts the same.

    The file is read back, and its predictions on up to 256 test samples are compared
    with the model's. They must have the same bits, or for ONNX differ by at most 0.0001
    of the largest output. Otherwise the file is deleted, and the exit code is 1.

    \b
    Examples:
      samestep export runs/mnist-cnn-20260101T000000Z --format onnx
      samestep export runs/mine --format state_dict --out mine.pt
    """
    from samestep.api import export
    from samestep.api.run import Run

    exported = export.export(Run.open(run), form, out, model, data)
    same = "the same bits"
    largest = f"differ by at most {exported.difference:.2g}"
    outcome = largest if exported.difference else same
    echo(f"{exported.path}: predictions on {exported.samples} samples: {outcome}")
