"""The documents as the tests read them: blocks of code, commands, links, flags."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
"""All that is written for people, but for the licences of files."""
PROSE = re.compile(r"\s{2,}")
"""What follows a command after so much space explains it."""


def code_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of each block of code; most have no language."""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            yield token.info.strip(), token.content


def code_spans(page: Path) -> Iterator[str]:
    """Yield every piece of code in a sentence."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or []:
            if child.type == "code_inline":
                yield child.content


def links(page: Path) -> Iterator[str]:
    """Yield the targets of all links and pictures."""
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or []:
            if child.type in ("link_open", "image"):
                yield str(child.attrGet("href" if child.type == "link_open" else "src"))


def commands(page: Path, program: str) -> Iterator[list[str]]:
    """Yield the arguments of every call of a program in the blocks of a page."""
    for _, content in code_blocks(page):
        for line in content.replace("\\\n", " ").splitlines():
            words = _words(PROSE.split(line.strip().removeprefix("$ "), 1)[0])
            if words and words[0].removeprefix(".venv/bin/") == program:
                yield words[1:]


def _words(command: str) -> list[str]:
    """Return the words up to a shell operator; none if it is no command."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:  # a quote in a sentence
        return []
    ends = [i for i, word in enumerate(words) if re.fullmatch(r"[&|;]+|>.*", word)]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # its environment
        words, ends = words[1:], [end - 1 for end in ends]
    return words[: ends[0]] if ends else words
