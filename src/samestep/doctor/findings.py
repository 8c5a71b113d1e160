"""Findings of the doctor: what it saw, why that matters, and what fixes it."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


Level = Literal["ok", "warning", "problem"]
INDENT = 9 + 19


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    subject: str
    seen: str
    why: str = ""
    """Why it matters; empty if it is ok."""
    mend: str = ""
    """The command that fixes it; empty if it is ok."""
    host: str = ""
    """The machine it is about; empty: this one, or both."""


def judge(
    subject: str,
    is_ok: bool,
    seen: str,
    why: str,
    mend: str,
    level: Level = "warning",
) -> Finding:
    """Return an ok finding, or one of `level` with its reason and remedy."""
    return (
        Finding("ok", subject, seen)
        if is_ok
        else Finding(level, subject, seen, why, mend)
    )


def text(findings: Sequence[Finding]) -> str:
    """Return all findings as text, and how many there are of each level."""
    levels = [finding.level for finding in findings]
    counts = [
        f"{level} {levels.count(level)}" for level in ("problem", "warning", "ok")
    ]
    return "\n".join([*map(_paragraph, findings), "", ", ".join(counts)])


def _paragraph(finding: Finding) -> str:
    head = f"{finding.level:<9}{finding.subject:<18} "
    seen = f"on {finding.host}: {finding.seen}" if finding.host else finding.seen
    lines = _wrapped(seen, head) + _wrapped(finding.why, INDENT * " ")
    lines += [f"{INDENT * ' '}$ {line}" for line in finding.mend.splitlines()]
    return "\n".join(lines)


def _wrapped(words: str, head: str) -> list[str]:
    return textwrap.wrap(
        words,
        88,
        initial_indent=head,
        subsequent_indent=INDENT * " ",
        break_long_words=False,
        break_on_hyphens=False,
    )
