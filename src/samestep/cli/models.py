"""What a trained model is good for, on the command line: `sample` and `export`."""

from pathlib import Path
from typing import Any

import click

from samestep.cli.options import model_and_data_options
from samestep.system.terminal import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", default="\n", help="How the text begins.")
@click.option(
    "--length",
    type=click.IntRange(1),
    default=400,
    show_default=True,
    help="Characters to write.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.8,
    show_default=True,
    help="0: always the likeliest character; higher: more random.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the characters drawn."
)
def sample(run: Path, prompt: str, **how: Any) -> None:
    """Generate text with the model of RUN, which was trained on text.

    \b
    Example:
      samestep sample runs/chars-transformer-20260101T000000Z --prompt "def "
    """
    from samestep.api import sample
    from samestep.api.run import Run

    echo(sample.sample(Run.open(run), prompt, **how))


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
    help="The file, which must not exist; default: RUN/exported.safetensors, .pt or "
    ".onnx.",
)
@model_and_data_options
def export(
    run: Path, form: str, out: Path | None, model: str | None, data: str | None
) -> None:
    """Write the model of RUN for other programs, and prove that it predicts the same.

    The file is read back, and its predictions on up to 256 test samples are compared
    with the model's: the same bits, or for ONNX at most 0.0001 of the largest output
    apart. Otherwise it is deleted, and the exit code is 1.

    \b
    Examples:
      samestep export runs/mnist-cnn-20260101T000000Z --format onnx
      samestep export runs/mine --format state_dict --out mine.pt
    """
    from samestep.api import export
    from samestep.api.run import Run

    done = export.export(Run.open(run), form, out, model, data)
    proof = (
        "the same bits"
        if done.difference == 0
        else f"differ by at most {done.difference:.2g}"
    )
    echo(f"{done.path}: predictions on {done.samples} samples: {proof}")
