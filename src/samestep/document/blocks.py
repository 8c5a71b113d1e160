"""The content of a report before it has a form: sections of plain blocks.

Texts are data, never markup: each form (HTML, Word) escapes them in its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from matplotlib.figure import Figure


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

    kind: ClassVar[str] = "facts"
    items: list[Fact]


@dataclass(frozen=True)
class Table:
    """Rows under column heads; the first `words` columns are text, not numbers."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Row
    rows: Sequence[Row]
    words: int = 1


@dataclass(frozen=True)
class Sheet:
    """Names and their values."""

    caption: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Sheets:
    """Sheets side by side."""

    kind: ClassVar[str] = "sheets"
    items: list[Sheet]


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

    kind: ClassVar[str] = "plots"
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

    kind: ClassVar[str] = "pictures"
    items: list[Picture]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Points:
    """A list."""

    kind: ClassVar[str] = "points"
    items: list[str]


@dataclass(frozen=True)
class Code:
    """Commands or a file, to be copied."""

    kind: ClassVar[str] = "code"
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


def side_by_side(plots: Sequence[Plot | None]) -> list[Block]:
    """Group the plots that exist: narrow ones first, wide ones after them."""
    present = [plot for plot in plots if plot is not None]
    groups = [[p for p in present if p.is_wide == wide] for wide in (False, True)]
    return [Plots(group) for group in groups if group]
