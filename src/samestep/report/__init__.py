"""Reports for people: one run, a scaling, or several runs side by side.

A document of plain blocks is made from the files of a run or a scaling; it is written
as one HTML file and, if asked for, as a Word document and as pictures.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from samestep.errors import SamestepError, UsageError


LIBRARIES = {"matplotlib": "matplotlib", "jinja2": "jinja2"}
"""What a report needs: module -> what pip calls it."""
FOR_WORD = {"docx": "python-docx"}


def write(
    path: str | Path,
    out: Path | None = None,
    *,
    docx: bool = False,
    png: bool = False,
) -> Path:
    """The report of a run directory, or of a directory with a scaling.json.

    Returns the path of the HTML file: `out`, or report.html in that directory. A Word
    document and a directory of pictures, if asked for, are put beside it. Raises
    RunError where there is nothing to report on, OutputError where a file cannot be
    written, UsageError where a library is missing.
    """
    _check_libraries(docx)
    from samestep.report import render

    return render.write(Path(path), out, docx=docx, png=png)


def offer(path: Path, tell: Callable[[str], None], *, png: bool = False) -> None:
    """At the end of a command whose result is already safe: the report, or why not."""
    try:
        write(path, png=png)
    except SamestepError as error:
        tell(f"note: no report.html: {error}")


def compare(
    runs: Sequence[str | Path],
    out: Path | None = None,
    *,
    docx: bool = False,
    png: bool = False,
) -> Path:
    """The curves of several runs in one report, and what is different about them.

    Returns the path of the HTML file: `out`, or comparison.html in the working
    directory. Raises as `write` does.
    """
    _check_libraries(docx)
    from samestep.report import render

    return render.compare([Path(run) for run in runs], out, docx=docx, png=png)


def _check_libraries(docx: bool) -> None:
    wanted = LIBRARIES | (FOR_WORD if docx else {})
    missing = [name for module, name in wanted.items() if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"A report needs {' and '.join(missing)}, which cannot be imported here. "
            "Install the libraries with `pip install 'samestep[report]'`."
        )
