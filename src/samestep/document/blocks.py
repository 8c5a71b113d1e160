"""A report before it has a form: sections of plain blocks.

Texts are data, never markup: each form (HTML, Word) escapes them in its own way.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
    """Shown large, side by side."""

    kind: ClassVar[str] = "facts"
    items: list[Fact]


@dataclass(frozen=True)
class Table:
    """Rows under column heads; `words` columns from the left are text, not numbers."""

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
    """Side by side."""

    kind: ClassVar[str] = "sheets"
    items: list[Sheet]


@dataclass(frozen=True)
class Plot:
    """A figure with what a reader who cannot see it needs to know."""

    name: str
    """Unique in the document: the name of its files and the prefix of its ids."""
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
    """`anchor` is unique in the document."""

    title: str
    anchor: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """`data` is everything that the numbers were made from, as plain JSON values."""

    title: str
    subtitle: str
    status: str
    notices: list[str]
    sections: list[Section]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def plots(self) -> list[Plot]:
        """Every figure, in order."""
        return [
            plot
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Plots)
            for plot in block.items
        ]


def together(plots: Sequence[Plot | None]) -> list[Block]:
    """Those there are: narrow ones side by side, wide ones after them."""
    found = [plot for plot in plots if plot is not None]
    groups = [[p for p in found if not p.is_wide], [p for p in found if p.is_wide]]
    return [Plots(group) for group in groups if group]
