"""What the tests of Lightning, Accelerate and Transformers have in common."""

import difflib
import json
from pathlib import Path
from typing import Any


EXAMPLES = Path(__file__).parents[1] / "examples"


def changed_lines(name: str) -> list[str]:
    """Return the lines by which the exact example differs from the plain one."""
    plain, exact = (
        (EXAMPLES / f"{name}_{kind}.py").read_text().split('"""', 2)[2].split("\n")
        for kind in ("plain", "exact")
    )
    return [
        line
        for line in difflib.unified_diff(plain, exact, n=0)
        if line.startswith("+") and line[1:].strip() and not line.startswith("+++")
    ]


def found(out: Path) -> tuple[str, Any]:
    """Return the fingerprint that a script wrote, and what was logged."""
    return (out / "sha256").read_text(), json.loads((out / "lines.json").read_text())
