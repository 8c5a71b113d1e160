"""Files of JSON lines in a run: metrics.jsonl and events.jsonl."""

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samestep.errors import RunError
from samestep.files import atomic, untrusted
from samestep.output.fence import Fence


@dataclass
class JsonLines:
    """A file of JSON lines; any thread may append."""

    path: Path
    fence: Fence
    warn: Callable[[str], None]
    _waiting: str = ""
    _failing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def any(self) -> bool:
        """Return whether there are lines, on the disk or in memory."""
        on_disk = self.path.exists() and self.path.stat().st_size > 0
        return on_disk or bool(self._waiting)

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record now, or with a later one once the disk works again.

        Raises OutputError if another process may write the run instead; see `Fence`.
        """
        with self._lock:
            self._waiting += json.dumps(record) + "\n"
            self._write()

    def _write(self) -> None:
        try:
            self.fence.check()
            atomic.append(self.path, self._waiting.encode())
        except OSError as error:
            if not self._failing:
                self.warn(
                    f"{self.path} cannot be written: {error.strerror}. The training "
                    "goes on; the lines wait in memory."
                )
            self._failing = True
        else:
            self._waiting = ""
            if self._failing:
                self.warn(f"{self.path} can be written again; no line was lost.")
            self._failing = False


def whole_lines(path: Path) -> list[str]:
    """Return a file's lines, without a last one that a kill has cut.

    Raises RunError.
    """
    try:
        lines = untrusted.read_text(path, "replace").splitlines(True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from None
    return [line for line in lines if line.endswith("\n")]
