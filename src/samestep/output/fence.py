"""The number of the generation that may write a run.

Several machines may see one run directory, and a process that was cut off or stopped
may wake up when others have gone on: a lock of the file system does not stop it
everywhere. So whoever begins to write puts a higher number into the directory, and
everybody looks at it before each write. A number is taken by a file of its name that
only one process can make, also where locks do not hold.
"""

import contextlib
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.errors import OutputError
from samestep.system import atomic_files, machine, untrusted_files


FILE = "generation"
MOST = 1 << 53
"""Of its number: what is beyond is none of ours."""
TAKEN = ".generation-"
"""So begin the names of the files that stand for numbers."""


def number_in(run: Path) -> int:
    """The newest number in a run directory; 0: none yet. Raises OSError."""
    number = _read(run).get("number", 0)
    return max(
        number if isinstance(number, int) and number < MOST else 0, *_taken(run), 0
    )


def _taken(run: Path) -> list[int]:
    names = [path.name for path in run.glob(f"{TAKEN}*")]
    digits = [name.removeprefix(TAKEN) for name in names if len(name) < 28]
    numbers = [int(text) for text in digits if text.isdecimal() and text.isascii()]
    return [number for number in numbers if number < MOST]


def writer_of(run: Path) -> str:
    """Who wrote a run last, as `machine.name_of_process` says it. Raises OSError."""
    return str(_read(run).get("writer", ""))


def _read(run: Path) -> dict[str, Any]:
    try:
        found = untrusted_files.parse_json(untrusted_files.read_bytes(run / FILE))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Fence:
    """The right to write a run, as long as nobody has a higher number."""

    run: Path
    number: int

    @classmethod
    def claim(cls, run: Path, number: int | None = None, writer: str = "") -> "Fence":
        """From now on only this generation writes; by default the next number.

        Raises OutputError if a higher one is there already, OSError.
        """
        fence = cls(run, _take(run) if number is None else number)
        fence.check()
        who = writer or machine.name_of_process(os.getpid())
        content = {"number": fence.number, "writer": who}
        atomic_files.write(run / FILE, json.dumps(content).encode() + b"\n")
        for older in _taken(run):
            if older < fence.number:
                (run / f"{TAKEN}{older}").unlink(missing_ok=True)
        return fence

    @property
    def holds(self) -> bool:
        """Whether nobody has begun to write since. Raises OSError."""
        return number_in(self.run) <= self.number

    def check(self) -> None:
        """Raises OutputError, OSError."""
        if not self.holds:
            raise OutputError(
                f"Only the newest generation of workers writes {self.run}: by now that "
                f"is {number_in(self.run)}, and this is {self.number}. It was cut off "
                "or stopped for so long that others have gone on; it ends here."
            )


def _take(run: Path) -> int:
    """The next number, which nobody else has then. Raises OSError."""
    for number in itertools.count(number_in(run) + 1):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(run / f"{TAKEN}{number}", os.O_CREAT | os.O_EXCL, 0o644))
            return number
    raise AssertionError
