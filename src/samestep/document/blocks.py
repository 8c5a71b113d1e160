"""The content of a report before it has a form: sections of plain blocks.

Texts are data, never markup: each form (HTML, Word) escapes them in its own way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.figure import Figure

from samestep.document.formatting import Value


T = TypeVar("T")
Row = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A number that matters, what it is, and half a sentence on it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class KeyFigures:
    """Facts shown large, side by side."""

    items: list[Fact]


@dataclass(frozen=True)
class Table:
    """Rows under column heads; the first `words` columns are text, not numbers.

    Without heads, the rows are names and their values.
    """

    caption: str
    columns: Row
    rows: Sequence[Row]
    words: int = 1


@dataclass(frozen=True)
class Sheets:
    """Tables without heads, side by side."""

    items: list[Table]


@dataclass(frozen=True)
class Plot:
    """A figure, and a description for readers who cannot see it."""

    name: str
    """Unique in the document: the name of its files and the salt of its ids."""
    title: str
    alt: str
    figure: Figure
    note: str = ""
    is_wide: bool = False


@dataclass(frozen=True)
class Plots:
    """Figures side by side."""

    items: list[Plot]


@dataclass(frozen=True)
class Picture:
    """A small PNG image with its title and text."""

    png: bytes
    title: str
    note: str


@dataclass(frozen=True)
class Pictures:
    """Images side by side."""

    items: list[Picture]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    items: list[str]


@dataclass(frozen=True)
class Code:
    """Commands or a file, to be copied."""

    caption: str
    text: str


Block = KeyFigures | Table | Sheets | Plots | Pictures | Text | Points | Code


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `anchor` is unique in the document."""

    title: str
    anchor: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A whole report; sections without blocks are left out."""

    title: str
    subtitle: str
    status: str
    notices: list[str]
    all_sections: list[Section]

    @property
    def sections(self) -> list[Section]:
        """The sections that have content."""
        return [section for section in self.all_sections if section.blocks]

    @property
    def plots(self) -> list[Plot]:
        """Every figure, in order."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [plot for b in blocks if isinstance(b, Plots) for plot in b.items]


def fact(
    label: str, value: Value, write: Callable[[Value], str], note: str = ""
) -> Fact | None:
    """Return a fact, or None if the value is unknown."""
    return None if value is None else Fact(label, write(value), note)


def key_figures(facts: Sequence[Fact | None]) -> list[Block]:
    """Return the facts that exist as one block, or nothing without any."""
    present = [fact for fact in facts if fact is not None]
    return [KeyFigures(present)] if present else []


def table(
    caption: str,
    items: Sequence[T],
    columns: Mapping[str, Callable[[T], str]],
    words: int = 1,
) -> Table:
    """Return a row for each item; `columns` maps each head to what its cell says."""
    rows = [tuple(cell(item) for cell in columns.values()) for item in items]
    return Table(caption, tuple(columns), rows, words)


def side_by_side(plots: Sequence[Plot | None]) -> list[Block]:
    """Group the plots that exist: narrow ones first, wide ones after them."""
    present = [plot for plot in plots if plot is not None]
    groups = [[p for p in present if p.is_wide == wide] for wide in (False, True)]
    return [Plots(group) for group in groups if group]
