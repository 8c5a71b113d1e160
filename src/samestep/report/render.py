"""Write a report's files: the page and, on request, a Word document and figures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from samestep.document import html, plot_style
from samestep.document.blocks import Document
from samestep.errors import OutputError, UsageError
from samestep.files import atomic
from samestep.report.comparison import comparison_document
from samestep.report.load import is_scaling, read_run, read_scaling
from samestep.report.run_report import run_document
from samestep.report.scaling_report import scaling_document


def write(path: Path, out: Path | None, *, docx: bool, png: bool) -> Path:
    """Write a report, see `samestep.report.write`."""
    if is_scaling(path):
        file = read_scaling(path)
        target = out or file.path / "report.html"
        return _write(lambda: scaling_document(file), target, docx, png)
    run = read_run(path)
    return _write(lambda: run_document(run), out or path / "report.html", docx, png)


def compare(paths: Sequence[Path], out: Path | None, *, docx: bool, png: bool) -> Path:
    """Write a comparison, see `samestep.report.compare`."""
    if len(paths) < 2:
        raise UsageError(
            f"A comparison takes two runs or more; received {len(paths)}. Example: "
            "`samestep report --compare runs/a runs/b`."
        )
    runs = [read_run(path) for path in paths]
    target = out or Path("comparison.html")
    return _write(lambda: comparison_document(runs), target, docx, png)


def _write(make: Callable[[], Document], target: Path, docx: bool, png: bool) -> Path:
    with plot_style.style():
        document = make()
        _put(target, html.render(document).encode())
        if docx:
            from samestep.document import word

            _put(target.with_suffix(".docx"), word.render(document))
        if png:
            _write_figures(document, target.with_name(f"{target.stem}-figures"))
    return target


def _write_figures(document: Document, directory: Path) -> None:
    for plot in document.plots:
        _put(directory / f"{plot.name}.png", plot_style.png(plot.figure))
        svg = plot_style.svg_file(plot.figure, plot.name)
        _put(directory / f"{plot.name}.svg", svg.encode())


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, content)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Choose another file with "
            "`--out`."
        ) from None
