"""The fence of a run: only the generation with the highest number may write it.

Several machines may see one run directory, and a process that was cut off or stopped
may wake up after others have taken over. File locks do not stop it on every file
system. So a new writer puts a higher number into the directory, and every writer checks
the number before each write. A number is claimed by creating a file of its name
exclusively, which works without locks.
"""

import contextlib
import itertools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from samestep.errors import OutputError
from samestep.files import atomic, untrusted
from samestep.system import machine
from samestep.system.json_values import JsonObject


FILE = "generation"
MOST = 1 << 53
"""Larger numbers are not samestep's."""
TAKEN = ".generation-"
"""The beginning of the names of files that claim a number."""


def number_in(run: Path) -> int:
    """Return the newest number in a run directory; 0: none yet. Raises OSError."""
    number = _read(run).get("number")
    numbers = [number] if isinstance(number, int) and number < MOST else []
    return max([0, *numbers, *_taken(run)])


def _taken(run: Path) -> list[int]:
    names = (path.name.removeprefix(TAKEN) for path in run.glob(f"{TAKEN}*"))
    numbers = [int(name) for name in names if re.fullmatch("[0-9]{1,16}", name)]
    return [number for number in numbers if number < MOST]


def writer_of(run: Path) -> str:
    """Return the `machine.name_of_process` of the last writer. Raises OSError."""
    return str(_read(run).get("writer", ""))


def _read(run: Path) -> JsonObject:
    try:
        content = untrusted.parse_json(untrusted.read_bytes(run / FILE))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@dataclass(frozen=True)
class Fence:
    """The right to write a run, as long as no other process has a higher number."""

    run: Path
    number: int

    @classmethod
    def claim(cls, run: Path, number: int | None = None, writer: str = "") -> "Fence":
        """Claim a number, by default the next one, and let only this generation write.

        Raises OutputError if there is a higher number already or another process has
        this one, and OSError.
        """
        fence = cls(run, _take_next(run) if number is None else number)
        fence.check()
        if number is not None and not _take(run, number):
            raise OutputError(
                "Each generation of workers that writes a run has a number of its own, "
                f"and another process already has number {number} of {run}. Start "
                "again."
            )
        writer = writer or machine.name_of_process(os.getpid())
        content = {"number": fence.number, "writer": writer}
        atomic.write(run / FILE, json.dumps(content).encode() + b"\n")
        for older in _taken(run):
            if older < fence.number:
                (run / f"{TAKEN}{older}").unlink(missing_ok=True)
        return fence

    @property
    def holds(self) -> bool:
        """Whether no other process has begun to write since. Raises OSError."""
        return number_in(self.run) <= self.number

    def check(self) -> None:
        """Raise OutputError if another process may write instead; OSError."""
        if not self.holds:
            raise OutputError(
                f"Only the newest generation of workers writes {self.run}: by now that "
                f"is {number_in(self.run)}, and this is {self.number}. It was cut off "
                "or stopped for so long that others have taken over; it ends here."
            )


def _take_next(run: Path) -> int:
    """Claim the next free number. Raises OSError."""
    return next(n for n in itertools.count(number_in(run) + 1) if _take(run, n))


def _take(run: Path, number: int) -> bool:
    """Claim a number; return whether no other process has it. Raises OSError."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(run / f"{TAKEN}{number}", os.O_CREAT | os.O_EXCL, 0o644))
        return True
    return False
