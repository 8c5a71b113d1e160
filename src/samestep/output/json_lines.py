"""Files of a run to which a training appends: metrics.jsonl, events.jsonl, ledger."""

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
class Appended:
    """A file that grows; any thread may append."""

    path: Path
    fence: Fence
    warn: Callable[[str], None]
    _waiting: bytes = b""
    _failing: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def any(self) -> bool:
        """Return whether there are lines, on the disk or in memory."""
        on_disk = self.path.exists() and self.path.stat().st_size > 0
        return on_disk or bool(self._waiting)

    def append_bytes(self, content: bytes) -> None:
        """Append now, or with what comes later once the disk works again.

        Raises OutputError if another process may write the run instead; see `Fence`.
        """
        with self._lock:
            self._waiting += content
            self._write()

    def _write(self) -> None:
        try:
            self.fence.check()
            atomic.append(self.path, self._waiting)
        except OSError as error:
            if not self._failing:
                self.warn(
                    f"{self.path} cannot be written: {error.strerror}. The training "
                    "goes on; what is to be written waits in memory."
                )
            self._failing = True
        else:
            self._waiting = b""
            if self._failing:
                self.warn(f"{self.path} can be written again; nothing was lost.")
            self._failing = False


class JsonLines(Appended):
    """A file of JSON lines."""

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record, as `append_bytes` does."""
        self.append_bytes(json.dumps(record).encode() + b"\n")


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
