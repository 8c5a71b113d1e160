"""A document as a Word file, with the figures as pictures."""

import io
from collections.abc import Iterator, Sequence
from typing import TypeVar, assert_never

import docx
from docx.document import Document as WordDocument
from docx.enum.text import WD_ALIGN_PARAGRAPH
from docx.oxml import OxmlElement
from docx.oxml.ns import qn
from docx.oxml.xmlchemy import BaseOxmlElement
from docx.shared import Cm, Emu, Pt, RGBColor
from docx.table import Table as WordTable
from docx.table import _Cell, _Row
from docx.text.paragraph import Paragraph

from samestep.document import blocks as doc
from samestep.document import plot_style
from samestep.system.terminal import clean


T = TypeVar("T")
PAGE_WIDTH = Cm(17.4)
TABLE_STYLE = "Light List Accent 1"
PICTURES_IN_A_ROW = 6


def render(document: doc.Document) -> bytes:
    """Return the content of the .docx file."""
    word = docx.Document()
    _set_up(word, document.title)
    word.add_heading(clean(document.title), level=0)
    word.add_paragraph(clean(document.subtitle))
    if document.status:
        word.add_paragraph(clean(f"Status: {document.status}"))
    for notice in document.notices:
        word.add_paragraph(clean(notice), style="Intense Quote")
    for section in document.sections:
        word.add_heading(section.title, level=1)
        for block in section.blocks:
            _add(word, block)
    file = io.BytesIO()
    word.save(file)
    return file.getvalue()


def _set_up(word: WordDocument, title: str) -> None:
    word.core_properties.title = clean(title)
    word.core_properties.author = "samestep"
    word.core_properties.comments = ""
    section = word.sections[0]
    section.page_width, section.page_height = Cm(21), Cm(29.7)
    section.left_margin = section.right_margin = Cm(1.8)
    section.top_margin = section.bottom_margin = Cm(2)
    style = word.styles["Normal"]
    style.font.name, style.font.size = "Calibri", Pt(10.5)


def _add(word: WordDocument, block: doc.Block) -> None:
    match block:
        case doc.KeyFigures():
            rows: list[doc.Row] = [(f.label, f.value, f.note) for f in block.items]
            _add_table(word, doc.Table("", ("what", "value", "note"), rows, words=3))
        case doc.Table():
            _add_table(word, block)
        case doc.Sheets():
            for sheet in block.items:
                _add_table(word, sheet)
        case doc.Plots():
            _add_plots(word, block)
        case doc.Pictures():
            _add_pictures(word, block)
        case doc.Text():
            paragraph = word.add_paragraph(clean(block.text))
            paragraph.paragraph_format.keep_with_next = block.text.endswith(":")
        case doc.Points():
            for item in block.items:
                word.add_paragraph(clean(item), style="List Bullet")
        case doc.Code():
            _add_caption(word, block.caption)
            run = word.add_paragraph().add_run(clean(block.text))
            run.font.name, run.font.size = "Consolas", Pt(8.5)
        case _:
            assert_never(block)


def _add_caption(word: WordDocument, text: str) -> None:
    paragraph = word.add_paragraph(clean(text), style="Caption")
    paragraph.paragraph_format.keep_with_next = True


def _add_table(word: WordDocument, block: doc.Table) -> None:
    if block.caption:
        _add_caption(word, block.caption)
    widths = _widths(block)
    table: WordTable = word.add_table(0, len(widths), style=TABLE_STYLE)
    table.autofit = False
    # Some programs read the widths of columns, others those of cells: see `_fill`.
    for column, width in zip(table.columns, widths, strict=True):
        column.width = Emu(width)
    heads = [block.columns] if block.columns else []
    for row in (*heads, *block.rows):
        _fill(table.add_row(), row, widths, block.words)
    if heads:  # repeated on the next page
        head = table.rows[0]._tr.get_or_add_trPr()
        head.append(_element("tblHeader", val="true"))
    else:
        look = table._tblPr.find(qn("w:tblLook"))
        look.set(qn("w:firstRow"), "0")
        look.set(qn("w:val"), "0480")  # the same for older programs
    word.add_paragraph()


def _widths(table: doc.Table) -> list[int]:
    """Return the columns' widths by their longest text; heads break between words."""
    if not table.columns:
        return [PAGE_WIDTH * 2 // 5, PAGE_WIDTH * 3 // 5]
    weights = []
    for at, head in enumerate(table.columns):
        words = [*head.split(), *(row[at] for row in table.rows)]
        # Four letters of space between all columns.
        weights.append(min(40, max(map(len, words))) + 4)
    return [PAGE_WIDTH * weight // sum(weights) for weight in weights]


def _fill(row: _Row, texts: doc.Row, widths: Sequence[int], words: int) -> None:
    size = Pt(8.5 if len(texts) < 8 else 7.5)
    _keep_whole(row)
    for at, (cell, text) in enumerate(zip(row.cells, texts, strict=True)):
        cell.width = Emu(widths[at])
        paragraph = cell.paragraphs[0]
        paragraph.paragraph_format.space_after = Pt(0)
        paragraph.add_run(_breakable(clean(text))).font.size = size
        if at >= words:
            paragraph.alignment = WD_ALIGN_PARAGRAPH.RIGHT


def _breakable(text: str) -> str:
    """Allow breaks inside a checksum, which would push a table over the page's edge."""
    if len(text) <= 40 or " " in text:
        return text
    parts = [text[at : at + 16] for at in range(0, len(text), 16)]
    return "\N{ZERO WIDTH SPACE}".join(parts)


def _add_plots(word: WordDocument, plots: doc.Plots) -> None:
    """Add figures two in a row, or one if any is wide."""
    columns = 1 if any(plot.is_wide for plot in plots.items) else 2
    width = PAGE_WIDTH // columns - Cm(0.4)
    for cell, plot in _in_rows(word, plots.items, columns):
        cell.paragraphs[0].add_run(clean(plot.title)).bold = True
        png = plot_style.png(plot.figure)
        _add_image(cell.add_paragraph(), png, width, plot.alt)
        if plot.note:
            note = cell.add_paragraph().add_run(clean(plot.note))
            note.font.size, note.font.color.rgb = Pt(9), RGBColor(0x59, 0x61, 0x6B)


def _add_pictures(word: WordDocument, pictures: doc.Pictures) -> None:
    for cell, picture in _in_rows(word, pictures.items, PICTURES_IN_A_ROW):
        paragraph = cell.paragraphs[0]
        alt = f"{picture.title}; {picture.note}"
        _add_image(paragraph, picture.png, Cm(2.2), alt)
        text = paragraph.add_run(clean(f"\n{picture.title}\n{picture.note}"))
        text.font.size = Pt(8)


def _in_rows(
    word: WordDocument, items: Sequence[T], columns: int
) -> Iterator[tuple[_Cell, T]]:
    """Yield an empty cell for each item, in rows that stay on one page."""
    table = word.add_table(0, columns)
    for at, item in enumerate(items):
        if at % columns == 0:
            row = table.add_row()
            _keep_whole(row)
        yield row.cells[at % columns], item
    word.add_paragraph()


def _add_image(paragraph: Paragraph, png: bytes, width: int, alt: str) -> None:
    shape = paragraph.add_run().add_picture(io.BytesIO(png), width=Emu(width))
    shape._inline.docPr.set("descr", clean(alt))


def _keep_whole(row: _Row) -> None:
    """Keep a row on one page."""
    row._tr.get_or_add_trPr().append(_element("cantSplit"))


def _element(name: str, **attributes: str) -> BaseOxmlElement:
    element = OxmlElement(f"w:{name}")
    for attribute, value in attributes.items():
        element.set(qn(f"w:{attribute}"), value)
    return element
