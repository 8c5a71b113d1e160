"""The design document as a Word file."""

import io

import docx
import pytest
import to_word
from docx.document import Document
from language import COLOURS
from markdown_it.tree import SyntaxTreeNode as Node
from PIL import Image, ImageColor


@pytest.fixture(scope="module")
def word(tmp_path_factory: pytest.TempPathFactory) -> Document:
    path = tmp_path_factory.mktemp("design") / "design.docx"
    to_word.write(path)
    return docx.Document(str(path))


def blocks(kind: str) -> list[Node]:
    return [
        node
        for page in to_word.pages()
        for block in to_word.parse(page)
        for node in block.walk()
        if node.type == kind
    ]


def written_in(word: Document, style: str) -> list[str]:
    return [
        paragraph.text
        for paragraph in word.paragraphs
        if paragraph.style and paragraph.style.name.startswith(style)
    ]


def test_it_has_every_chapter_of_the_folder() -> None:
    pages = set(to_word.HERE.glob("*.md")) - {to_word.HERE / "index.md"}
    assert set(to_word.pages()) == pages


def test_it_has_every_section_in_the_order_of_the_pages(word: Document) -> None:
    headings = written_in(word, "Heading")
    written = [node.children[0].content for node in blocks("heading")]
    assert [text.split("  ")[1] for text in headings] == written


def test_it_has_every_figure_with_its_words(word: Document) -> None:
    descriptions = [shape._inline.docPr.get("descr") for shape in word.inline_shapes]
    assert descriptions == [
        " ".join(image.content.split()) for image in blocks("image")
    ]
    assert written_in(word, "Caption") == [
        f"Figure {n}. {text}" for n, text in enumerate(descriptions, start=1)
    ]


def test_it_has_every_number_of_the_tables(word: Document) -> None:
    cells = [c.text for t in word.tables for row in t.rows for c in row.cells]
    written = [to_word.plain(node) for kind in ("th", "td") for node in blocks(kind)]
    assert sorted(filter(None, cells)) == sorted(filter(None, written))


def test_a_drawing_becomes_a_picture_on_light_paper() -> None:
    png, width, height = to_word.figure(to_word.HERE.parent / "step.svg")
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.width / picture.height == pytest.approx(width / height, abs=0.01)
    colours = {colour: count for count, colour in picture.getcolors(1 << 24) or []}
    assert max(colours, key=colours.__getitem__) == ImageColor.getrgb(
        COLOURS["paper"][0]
    )
