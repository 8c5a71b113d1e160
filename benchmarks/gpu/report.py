"""What a part says: its figures, and what went wrong. Kept in a file while it runs."""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A part, or a check, that cannot be done here; the message says why."""


class Failed(Exception):
    """A part of which some checks have failed."""


@dataclass
class Report:
    """The report of one part."""

    file: Path
    figures: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)

    def check(self, what: str, check: Callable[[], str]) -> None:
        """Do a check, and go on with the next one if it fails."""
        try:
            self.checks[what] = check()
        except Skipped as reason:
            self.checks[what] = f"skipped: {reason}"
        except Exception as error:
            traceback.print_exc()
            self.checks[what] = f"failed: {_first_line(error)}"
        print(f"{what}: {self.checks[what]}", flush=True)
        self.save(None)

    def run(self, part: Callable[["Report"], None]) -> None:
        """Do the part, and say how it ended."""
        try:
            part(self)
            failed = [w for w, text in self.checks.items() if text[:6] == "failed"]
            if failed:
                raise Failed("; ".join(f"{w}: {self.checks[w]}" for w in failed))
        except Skipped as reason:
            self.save("skipped", str(reason))
        except Failed as error:
            self.save("failed", str(error))
        except Exception as error:
            traceback.print_exc()
            self.save("failed", _first_line(error))
        else:
            self.save("passed")

    def save(self, status: str | None, message: str = "") -> None:
        """Write what is known so far; without a status the part has not ended."""
        content: dict[str, Any] = {"status": status}
        content |= {"message": message} if message else {}
        content |= {"checks": self.checks} if self.checks else {}
        content |= {"figures": self.figures} if self.figures else {}
        self.file.write_text(json.dumps(content))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:500]
