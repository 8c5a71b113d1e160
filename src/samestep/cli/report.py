"""The command `samestep report`; imports little until it runs."""

from pathlib import Path

import click

from samestep.errors import UsageError
from samestep.system.terminal import echo


@click.command()
@click.argument(
    "paths",
    nargs=-1,
    required=True,
    metavar="RUN|SCALING...",
    type=click.Path(path_type=Path),
)
@click.option("--compare", is_flag=True, help="Put several runs into one report.")
@click.option("--docx", is_flag=True, help="Also write a Word document.")
@click.option("--png", is_flag=True, help="Also write every figure as PNG and SVG.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The HTML file; default: report.html in the directory, or comparison.html "
    "here. The other files go beside it.",
)
def report(
    paths: tuple[Path, ...], compare: bool, docx: bool, png: bool, out: Path | None
) -> None:
    """Write a report on a run, or on a directory with a scaling.json.

    The report is one HTML file that opens offline, prints, and fits a phone.

    \b
    Examples:
      samestep report runs/mnist-mlp-20260101T000000Z
      samestep report runs/mine --docx --png
      samestep report scaling/mnist-mlp --out speedup.html
      samestep report --compare runs/a runs/b runs/c
    """
    from samestep import report as report_

    if not compare and len(paths) > 1:
        raise UsageError(
            f"A report is on one run or scaling; received {len(paths)}. Use "
            "`--compare` for several runs in one report."
        )
    if compare:
        page = report_.compare(paths, out, docx=docx, png=png)
    else:
        page = report_.write(paths[0], out, docx=docx, png=png)
    echo(page)
    if docx:
        echo(page.with_suffix(".docx"))
    if png:
        echo(page.with_name(f"{page.stem}-figures"))
