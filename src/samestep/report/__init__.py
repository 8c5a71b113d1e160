"""Reports: one run, a scaling study, or several runs side by side.

The files of a run or a study become a document of plain blocks, which is written as one
HTML file and, on request, as a Word document and as figures.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from samestep.errors import SamestepError, UsageError
from samestep.system.log import logger


LIBRARIES = {"matplotlib": "matplotlib", "jinja2": "jinja2"}
"""The modules that a report needs -> their names for pip."""
FOR_WORD = {"docx": "python-docx"}


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
    from samestep.report import render  # imports matplotlib, which takes a second

    return render.write(Path(path), out, docx=docx, png=png)


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
    from samestep.report import render

    return render.compare([Path(run) for run in runs], out, docx=docx, png=png)


def _check_libraries(docx: bool) -> None:
    needed = LIBRARIES | (FOR_WORD if docx else {})
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"A report needs {' and '.join(missing)}, which cannot be imported here. "
            "Install the libraries with `pip install 'samestep[report]'`."
        )
