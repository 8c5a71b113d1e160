"""Reports: one run, a scaling study, or several runs side by side.

The files of a run or a study become a document of plain blocks, which is written as one
HTML file and, on request, as a Word document and as figures. What imports matplotlib,
which takes a second, is imported when a report is written.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from samestep.errors import OutputError, SamestepError, UsageError
from samestep.files import atomic
from samestep.report import load
from samestep.system.log import logger


if TYPE_CHECKING:
    from samestep.document.blocks import Document


def write(
    path: str | Path,
    out: Path | None = None,
    *,
    docx: bool = False,
    png: bool = False,
) -> Path:
    """Write the report of a run directory, or of a directory with a scaling.json.

    Returns the path of the HTML file: `out`, or report.html in that directory. A Word
    document and a directory of figures, if requested, are put beside it. Raises
    RunError if there is nothing to report on, OutputError if a file cannot be written,
    UsageError if a library is missing.
    """
    _check_libraries(docx)
    from samestep.document.plot_style import style
    from samestep.report.run_report import run_document
    from samestep.report.scaling_report import scaling_document

    path = Path(path)
    directory = path.parent if path.is_file() else path
    with style():
        if path.is_file() or (path / load.SCALING_FILE).is_file():
            document = scaling_document(load.read_scaling(path), directory)
        else:
            document = run_document(load.read_run(path))
        return _write(document, out or directory / "report.html", docx, png)


def try_to_write(path: Path, *, png: bool = False) -> None:
    """Write a report on results that are already safe, or log why there is none."""
    try:
        write(path, png=png)
    except SamestepError as error:
        logger.info("note: no report.html: %s", error)


def compare(
    runs: Sequence[str | Path],
    out: Path | None = None,
    *,
    docx: bool = False,
    png: bool = False,
) -> Path:
    """Write the curves of several runs, and how the runs differ, in one report.

    Returns the path of the HTML file: `out`, or comparison.html in the working
    directory. Raises as `write` does.
    """
    _check_libraries(docx)
    from samestep.document.plot_style import style
    from samestep.report.comparison import comparison_document

    if len(runs) < 2:
        raise UsageError(
            f"A comparison takes two runs or more; received {len(runs)}. Example: "
            "`samestep report --compare runs/a runs/b`."
        )
    files = [load.read_run(Path(run)) for run in runs]
    with style():
        document = comparison_document(files)
        return _write(document, out or Path("comparison.html"), docx, png)


def _check_libraries(docx: bool) -> None:
    needed = ["matplotlib", "jinja2", *(["docx"] if docx else [])]
    missing = [module for module in needed if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"A report needs {' and '.join(missing)}, which cannot be imported here. "
            "Install the libraries with `pip install 'samestep[report]'`."
        )


def _write(document: "Document", target: Path, docx: bool, png: bool) -> Path:
    from samestep.document import html, plot_style

    _put(target, html.render(document).encode())
    if docx:
        from samestep.document import word

        _put(target.with_suffix(".docx"), word.render(document))
    if png:
        directory = target.with_name(f"{target.stem}-figures")
        for plot in document.plots:
            _put(directory / f"{plot.name}.png", plot_style.png(plot.figure))
            svg = plot_style.svg_file(plot.figure, plot.name)
            _put(directory / f"{plot.name}.svg", svg.encode())
    return target


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, content)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Choose another file with "
            "`--out`."
        ) from None
