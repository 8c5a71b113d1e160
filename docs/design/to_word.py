"""The design document as one Word file, from the same pages: `make design-docx`.

    python docs/design/to_word.py build/samestep-design.docx

Chapters are the pages of index.md's toctree, in its order. Drawings become pictures in
their light and still form.
"""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import docx
import matplotlib as mpl
import resvg_py
from docx.document import Document
from docx.enum.text import WD_ALIGN_PARAGRAPH
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.oxml import OxmlElement
from docx.oxml.ns import qn
from docx.oxml.xmlchemy import BaseOxmlElement
from docx.shared import Cm, Emu, Pt, RGBColor
from docx.table import _Cell
from docx.text.font import Font
from docx.text.paragraph import Paragraph
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode as Node


HERE = Path(__file__).parent
TITLE = "The design of samestep"
SUBTITLE = "Distributed training with the same bits at any number of workers"
PAGE_WIDTH, TALLEST = Cm(17.0), Cm(19.0)
TABLE_STYLE = "Light List Accent 1"
PIXELS_PER_INCH, SHARPNESS = 96, 3
LINK = RGBColor(0x0B, 0x5C, 0xAD)
NUMBER = r"[+-]?[\d.,]+%?( \([\d.,-]+\))?"
FONTS = str(Path(mpl.get_data_path()) / "fonts" / "ttf")


def pages() -> list[Path]:
    """Return the paths of the chapters."""
    index = (HERE / "index.md").read_text(encoding="utf-8")
    _, toctree = index.split("```{toctree}\n:hidden:\n")
    return [HERE / f"{name}.md" for name in toctree.split("```")[0].split()]


def parse(page: Path) -> list[Node]:
    """Return the blocks of a page."""
    parser = MarkdownIt("commonmark").enable("table")
    return Node(parser.parse(page.read_text(encoding="utf-8"))).children


def figure(path: Path) -> tuple[bytes, int, int]:
    """Return an SVG as PNG, with its width and height in EMU."""
    png = resvg_py.svg_to_bytes(
        svg_path=str(path),
        dpi=PIXELS_PER_INCH,
        zoom=SHARPNESS,
        background="white",
        skip_system_fonts=True,
        font_dirs=[FONTS],
        sans_serif_family="DejaVu Sans",
        monospace_family="DejaVu Sans Mono",
    )
    sides = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    width, height = (side * 914_400 / PIXELS_PER_INCH / SHARPNESS for side in sides)
    scale = min(1, PAGE_WIDTH / width, TALLEST / height)
    return bytes(png), round(width * scale), round(height * scale)


class Book:
    """A Word document under construction."""

    def __init__(self) -> None:
        self.word: Document = docx.Document()
        self._figures = self._sections = self._chapters = 0
        _set_up(self.word)

    def add_front(self) -> None:
        """Add the title and the contents, with links to the chapters."""
        self.word.add_heading(TITLE, level=0)
        self.word.add_paragraph(SUBTITLE, style="Subtitle")
        for number, page in enumerate(pages(), start=1):
            title = plain(parse(page)[0])
            line = self.word.add_paragraph(f"{number}  ")
            line.paragraph_format.space_after = Pt(2)
            _link(line, title, anchor=page.stem)

    def add_chapter(self, page: Path) -> None:
        """Add all blocks of one page."""
        for block in parse(page):
            self._add(block, page)

    def _add(self, block: Node, page: Path) -> None:
        match block.type:
            case "heading":
                self._add_heading(block, page)
            case "paragraph" if _is_figure(block):
                self._add_figure(block.children[0].children[0])
            case "paragraph":
                _write(self.word.add_paragraph(), block.children[0])
            case "bullet_list" | "ordered_list":
                self._add_list(block)
            case "table":
                self._add_table(block)
            case "fence" | "code_block":
                self._add_code(block.content.rstrip("\n"))
            case _:
                raise ValueError(f"{page.name}: no form in Word for {block.type}")

    def _add_heading(self, block: Node, page: Path) -> None:
        level = int(block.tag[1])
        if level == 1:
            self._chapters, self._sections = self._chapters + 1, 0
            number = f"{self._chapters}"
        else:
            self._sections += 1
            number = f"{self._chapters}.{self._sections}"
        made = self.word.add_heading(f"{number}  {plain(block)}", level=level)
        if level == 1:
            _bookmark(made, page.stem, self._chapters)

    def _add_figure(self, image: Node) -> None:
        self._figures += 1
        png, width, height = figure((HERE / str(image.attrs["src"])).resolve())
        paragraph = self.word.add_paragraph()
        paragraph.alignment = WD_ALIGN_PARAGRAPH.CENTER
        paragraph.paragraph_format.keep_with_next = True
        shape = paragraph.add_run().add_picture(
            io.BytesIO(png), width=Emu(width), height=Emu(height)
        )
        text = " ".join(image.content.split())
        shape._inline.docPr.set("descr", text)
        caption = self.word.add_paragraph(f"Figure {self._figures}. {text}", "Caption")
        caption.alignment = WD_ALIGN_PARAGRAPH.CENTER

    def _add_list(self, block: Node) -> None:
        """Add a list, its numbers as text: Word would continue those of another."""
        for number, item in enumerate(block.children, start=1):
            is_numbered = block.type == "ordered_list"
            style = "Normal" if is_numbered else "List Bullet"
            paragraph = self.word.add_paragraph(style=style)
            paragraph.paragraph_format.space_after = Pt(3)
            if is_numbered:
                paragraph.paragraph_format.left_indent = Cm(0.7)
                paragraph.paragraph_format.first_line_indent = Cm(-0.7)
                paragraph.paragraph_format.tab_stops.add_tab_stop(Cm(0.7))
                paragraph.add_run(f"{number}.\t")
            _write(paragraph, item.children[0].children[0])

    def _add_table(self, block: Node) -> None:
        rows = [row.children for part in block.children for row in part.children]
        texts = [[plain(cell) for cell in row] for row in rows]
        widths, numeric = _widths(texts), _numeric(texts)
        table = self.word.add_table(0, len(widths), style=TABLE_STYLE)
        table.autofit = False
        has_head = any(texts[0])
        if not has_head:
            look = table._tblPr.find(qn("w:tblLook"))
            look.set(qn("w:firstRow"), "0")
            look.set(qn("w:val"), "0480")  # the same, for older programs
        for cells in rows if has_head else rows[1:]:
            made = table.add_row()
            made._tr.get_or_add_trPr().append(_element("cantSplit"))
            for at, (cell, content) in enumerate(zip(made.cells, cells, strict=True)):
                _fill(cell, content, widths[at], size=9 if len(widths) < 7 else 8)
                if at in numeric:
                    cell.paragraphs[0].alignment = WD_ALIGN_PARAGRAPH.RIGHT
        if has_head:
            head = table.rows[0]._tr.get_or_add_trPr()
            head.append(_element("tblHeader", val="true"))
        self.word.add_paragraph().paragraph_format.space_after = Pt(4)

    def _add_code(self, text: str) -> None:
        paragraph = self.word.add_paragraph()
        paragraph.paragraph_format.left_indent = Cm(0.7)
        _as_code(paragraph.add_run(text).font)


def _set_up(word: Document) -> None:
    word.core_properties.title = TITLE
    word.core_properties.author = "samestep"
    word.core_properties.comments = ""
    section = word.sections[0]
    section.page_width, section.page_height = Cm(21), Cm(29.7)
    section.left_margin = section.right_margin = Cm(2)
    section.top_margin = section.bottom_margin = Cm(2)
    style = word.styles["Normal"]
    style.font.name, style.font.size = "Calibri", Pt(10.5)
    footer = section.footer.paragraphs[0]
    footer.alignment = WD_ALIGN_PARAGRAPH.CENTER
    field = _element("fldSimple", instr="PAGE")
    footer._p.append(field)


def _is_figure(paragraph: Node) -> bool:
    return [child.type for child in paragraph.children[0].children] == ["image"]


def plain(block: Node) -> str:
    """Return the text without markup."""
    return "".join(
        " " if node.type == "softbreak" else node.content
        for node in block.walk()
        if node.type in ("text", "code_inline", "softbreak")
    )


def _write(paragraph: Paragraph, inline: Node) -> None:
    for node, marks in _runs(inline, frozenset()):
        href = next((mark for mark in marks if mark not in ("strong", "em")), "")
        text = " " if node.type == "softbreak" else node.content
        if href.startswith("https:"):
            _link(paragraph, text, address=href)
        elif Path(href).name in [page.name for page in pages()]:
            _link(paragraph, text, anchor=Path(href).stem)
        else:
            run = paragraph.add_run(text)
            run.bold = "strong" in marks or None
            run.italic = "em" in marks or None
            if node.type == "code_inline":
                _as_code(run.font)


def _runs(node: Node, marks: frozenset[str]) -> Iterator[tuple[Node, frozenset[str]]]:
    """Yield pieces of text, each with its styles: strong, em, or an address."""
    for child in node.children:
        if child.type in ("text", "code_inline", "softbreak"):
            yield child, marks
        elif child.type in ("strong", "em"):
            yield from _runs(child, marks | {child.type})
        elif child.type == "link":
            yield from _runs(child, marks | {str(child.attrs["href"])})
        else:
            raise ValueError(f"no form in Word for {child.type}")


def _as_code(font: Font) -> None:
    font.name, font.size = "Consolas", Pt(9)


def _widths(rows: list[list[str]]) -> list[int]:
    """Return column widths by the longest text, up to a limit; words stay whole."""
    weights = []
    for column in zip(*rows, strict=True):
        longest_word = max(len(word) for text in column for word in [*text.split(), ""])
        longest = max(map(len, column))
        weights.append(max(longest_word, min(longest, 42)) + 4)
    return [PAGE_WIDTH * weight // sum(weights) for weight in weights]


def _numeric(rows: list[list[str]]) -> set[int]:
    """Return the columns of numbers, which may have a range in brackets."""
    return {
        at
        for at, (_, *texts) in enumerate(zip(*rows, strict=True))
        if at and all(re.fullmatch(NUMBER, text) for text in texts)
    }


def _fill(cell: _Cell, content: Node, width: int, size: float) -> None:
    cell.width = Emu(width)
    paragraph = cell.paragraphs[0]
    paragraph.paragraph_format.space_after = Pt(0)
    _write(paragraph, content.children[0])
    for run in paragraph.runs:
        run.font.size = Pt(size if run.font.name is None else size - 1)


def _link(paragraph: Paragraph, text: str, anchor: str = "", address: str = "") -> None:
    """Add a link to a chapter of the document, or to an address."""
    run = paragraph.add_run(text)
    run.font.color.rgb, run.font.underline = LINK, True
    if address:
        relation = paragraph.part.relate_to(
            address, RELATIONSHIP_TYPE.HYPERLINK, is_external=True
        )
        link = OxmlElement("w:hyperlink")
        link.set(qn("r:id"), relation)
    else:
        link = _element("hyperlink", anchor=anchor)
    run._r.addprevious(link)
    link.append(run._r)


def _bookmark(paragraph: Paragraph, name: str, number: int) -> None:
    paragraph._p.append(_element("bookmarkStart", id=str(number), name=name))
    paragraph._p.append(_element("bookmarkEnd", id=str(number)))


def _element(tag: str, /, **attributes: str) -> BaseOxmlElement:
    made = OxmlElement(f"w:{tag}")
    for attribute, value in attributes.items():
        made.set(qn(f"w:{attribute}"), value)
    return made


def write(target: Path) -> None:
    """Write the document to `target`."""
    book = Book()
    book.add_front()
    for page in pages():
        book.add_chapter(page)
    target.parent.mkdir(parents=True, exist_ok=True)
    book.word.save(str(target))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
