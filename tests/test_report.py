"""The content and look of reports: pages, Word documents and figures."""

import io
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import docx
import pytest
from conftest import Train, small_recipe
from report_samples import RECIPE, epoch, write_run, write_scaling
from test_cli import samestep

from samestep import report
from samestep.document import formatting, plot_style
from samestep.errors import UsageError
from samestep.output.schema import Prediction
from samestep.report.scaling_report import predictions_table
from samestep.system import terminal


PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """The elements of a page, as a browser would find them, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: str = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """One page of each kind."""
    base = tmp_path_factory.mktemp("pages")
    run, other = write_run(base / "a"), write_run(base / "b", train_seconds=3.0)
    measured = write_scaling(base / "scaling")
    return {
        "run": Page(report.write(run)),
        "scaling": Page(report.write(measured)),
        "comparison": Page(report.compare([run, other], base / "comparison.html")),
    }


@pytest.fixture(params=["run", "scaling", "comparison"])
def page(request: pytest.FixtureRequest, pages: dict[str, Page]) -> Page:
    return pages[request.param]


def test_a_page_is_one_file_that_loads_nothing_else(page: Page) -> None:
    linked = page.attributes("src") + page.attributes("href")
    linked += page.attributes("xlink:href")
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in linked)
    assert set(re.findall(r"url\((.)", page.source)) <= {"#"}
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    assert not page.all("link")


def test_a_page_forbids_itself_scripts_and_addresses(page: Page) -> None:
    policies = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    ]
    assert not page.all("script")
    handlers = [
        name for _, attrs in page.elements for name in attrs if name.startswith("on")
    ]
    assert not handlers


def test_ids_are_unique_and_references_lead_somewhere(page: Page) -> None:
    ids = Counter(page.attributes("id"))
    assert max(ids.values()) == 1
    used = re.findall(r"url\(#([^)]+)\)", page.source)
    used += [link[1:] for link in page.attributes("href") if link.startswith("#")]
    used += page.attributes("aria-labelledby")
    assert used
    assert set(used) <= set(ids)


def test_a_reader_who_cannot_see_gets_everything_in_words(page: Page) -> None:
    drawings = [attrs for _, attrs in page.elements if attrs.get("role") == "img"]
    assert len(drawings) == len(page.all("svg")) > 0
    assert all(len(attrs["aria-label"] or "") > 30 for attrs in drawings)
    assert all(len(attrs["alt"] or "") > 10 for attrs in page.all("img"))
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert page.all("html") == [{"lang": "en"}]


def luminance(colour: str) -> float:
    """Return the luminance of #rrggbb, as WCAG 2 defines it."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [
        s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_the_page(scheme: int) -> None:
    on = plot_style.COLOURS["card"][scheme]
    for name in ("ink", "muted"):
        assert contrast(plot_style.COLOURS[name][scheme], on) >= 4.5
    for at in range(len(plot_style.SERIES)):
        assert contrast(plot_style.COLOURS[f"series-{at}"][scheme], on) >= 3


def test_figures_in_a_page_take_their_colours_from_the_readers_scheme(
    pages: dict[str, Page],
) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", pages["run"].source, re.DOTALL))
    assert "var(--series-0)" in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    texts = [report.write(run, tmp_path / name).read_bytes() for name in "ab"]
    assert texts[0] == texts[1]


def test_the_numbers_are_those_of_the_files(pages: dict[str, Page]) -> None:
    page = pages["run"]
    for shown in ("98.34%", "0.0553", "5.90 s", "3" * 64, "AMD EPYC 9654", "8 GiB"):
        assert shown in page.text
    for name, value in formatting.flat(RECIPE):
        assert name in page.text
        assert formatting.setting(value) in page.text
    assert "/recipe.toml --workers 2 --exchange shared" in page.text


def test_a_run_shows_its_failures_classes_and_worst_images(
    pages: dict[str, Page],
) -> None:
    page = pages["run"]
    assert "Worker 1 was killed (SIGKILL)." in page.text
    assert "after step 320: micro-batches 1, 3 instead of 2, 2" in page.text
    assert "Confusion matrix" in page.text
    assert len(page.all("img")) == 12
    assert "1 taken for 3" in page.text


def test_a_scaling_has_the_table_of_expected_and_measured_speedups(
    pages: dict[str, Page],
) -> None:
    page = pages["scaling"]
    rows = re.findall(r"<tr>(.*?)</tr>", page.source, re.DOTALL)
    cells = [re.findall(r"<bdi>(.*?)</bdi>", row) for row in rows]
    row = ["2", "2.00x", "1.86x", "1.81 to 1.90", "93.0%", "1.96x", "94.9%"]
    assert row in [
        [c.replace("\N{MULTIPLICATION SIGN}", "x") for c in r[:7]] for r in cells
    ]
    for shown in ("alpha", "1.9%", "Beyond 6 nodes"):
        assert shown in page.text
    assert "--bandwidth 10000Mbit --latency 50us --weak" in page.text


def test_a_model_of_text_is_held_against_simple_methods(tmp_path: Path) -> None:
    baselines = {"unigram": 4.5367, "gzip": 1.95}
    run = write_run(tmp_path / "run", test_loss=math.log(2) * 1.25, baselines=baselines)
    text = Page(report.write(run)).text
    assert re.search(r"Bits per character\s*1.250\s*unigram 4.537, gzip 1.950", text)


def test_of_many_predictions_some_are_shown() -> None:
    def of(nodes: int) -> Prediction:
        return Prediction(where="nodes", workers=2 * nodes, nodes=nodes, global_batch=9)

    table = predictions_table("P", [of(nodes) for nodes in range(1, 41)])
    assert table.caption == "P (some of them; all are in scaling.json)"
    shown = [int(row[1]) for row in table.rows]
    assert shown == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 40]
    assert predictions_table("P", [of(2), of(3)]).caption == "P"


def test_a_comparison_shows_what_differs_and_what_is_identical(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one")
    other = write_run(
        tmp_path / "other",
        recipe=RECIPE | {"seed": 7},
        weights_sha256="4" * 64,
        epochs=[epoch(1), epoch(2)],
    )
    page = Page(report.compare([one, one, other], tmp_path / "c.html"))
    assert "The same weights, bit for bit: A and B." in page.text
    rows = re.findall(r"<tr>(.*?)</tr>", page.source, re.DOTALL)
    cells = [re.findall(r"<bdi>(.*?)</bdi>", row) for row in rows]
    assert ["seed", "0", "0", "7"] in cells
    assert "optimizer.lr" not in page.text
    assert "Placement: no difference." in page.text


def test_a_word_document_has_the_same_sections_tables_and_figures(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run")
    page = Page(report.write(run, docx=True))
    document = docx.Document(str(run / "report.docx"))
    heads = [
        paragraph.text
        for paragraph in document.paragraphs
        if paragraph.style and paragraph.style.name == "Heading 1"
    ]
    assert heads == re.findall(r"<h2[^>]*>(.*?)</h2>", page.source)
    described = [shape._inline.docPr.get("descr") for shape in document.inline_shapes]
    assert len(described) == len(page.all("svg")) + len(page.all("img"))
    assert all(described)
    cells = [c.text for t in document.tables for row in t.rows for c in row.cells]
    assert {"98.34%", "98.13%", "optimizer.lr", "0.004"} <= set(cells)


def test_every_figure_is_written_as_png_and_svg(tmp_path: Path) -> None:
    measured = write_scaling(tmp_path / "measured")
    page = Page(report.write(measured / "scaling.json", tmp_path / "r.html", png=True))
    written = sorted((tmp_path / "r-figures").iterdir())
    assert len(written) == 2 * len(page.all("svg"))
    for file in written:
        content = file.read_bytes()
        is_png = content.startswith(PNG)
        assert is_png if file.suffix == ".png" else b"<svg" in content


def test_a_real_training_is_reported_on(tmp_path: Path, train: Train) -> None:
    run = train(small_recipe(epochs=2), workers=2)
    page = Page(report.write(run.path))
    assert run.weights_sha256 in page.text
    assert "Phases of each worker" in page.text
    assert f"{run.result['test_accuracy']:.2%}" in page.text


def test_the_command_prints_the_paths_of_what_it_wrote(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    done = samestep("report", str(run), "--out", str(tmp_path / "page.html"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'page.html'}\n"
    other = write_run(tmp_path / "other")
    compared = tmp_path / "c.html"
    both = ("--compare", str(run), str(other), "--docx", "--png")
    done = samestep("report", *both, "--out", str(compared))
    assert (done.returncode, done.stderr) == (0, "")
    written = [tmp_path / name for name in ("c.html", "c.docx", "c-figures")]
    assert done.stdout.splitlines() == list(map(str, written))
    assert all(path.exists() for path in written)
    assert "2 runs compared" in compared.read_text()


def test_the_libraries_of_reports_are_imported_only_when_needed() -> None:
    code = (
        "import sys, samestep, samestep.api.train; assert 'samestep.report' not in "
        "sys.modules; import samestep.cli.main; "
        "sys.exit(bool({'matplotlib', 'jinja2', 'docx'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("module", "word"), [("jinja2", False), ("docx", True)])
def test_a_missing_library_is_named_with_what_installs_it(
    module: str, word: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == module else 1)
    with pytest.raises(UsageError, match=r"pip install 'samestep\[report\]'"):
        report.write(write_run(tmp_path / "run"), docx=word)


def numbers() -> Iterator[tuple[str, str]]:
    """Yield (formatted text, expected text)."""
    nan = float("nan")
    yield formatting.seconds(85e-6), "85.0 µs"
    yield formatting.seconds(0.0123), "12.3 ms"
    yield formatting.seconds(0.0), "0 s"
    yield formatting.prefixed(4.711e-10, "s/byte"), "471 ps/byte"
    yield formatting.seconds(8.314), "8.31 s"
    yield formatting.seconds(725), "12 min 5 s"
    yield formatting.seconds(12_000), "3 h 20 min"
    yield formatting.size(32_768), "32 KiB"
    yield formatting.size(25_276_502_016), "23.54 GiB"
    yield formatting.percent(0.98341, 2), "98.34%"
    yield formatting.significant(0.000066), "6.600e-05".replace("-", "\N{MINUS SIGN}")
    yield formatting.significant(0.0123456), "0.01235"
    yield formatting.significant(123_456.7), "123,457"
    yield formatting.count(nan), "not finite"
    yield formatting.count(float("inf")), "not finite"
    yield formatting.count(None), "\N{EN DASH}"
    yield terminal.clean("a\x1b[31m\u202eb\ttab\n"), "a\\x1b[31m\\u202eb\ttab\n"


@pytest.mark.parametrize(("written", "expected"), [*numbers()])
def test_numbers_and_foreign_text_are_written_for_people(
    written: str, expected: str
) -> None:
    assert written == expected


def test_pictures_of_digits_are_png_images(pages: dict[str, Page]) -> None:
    import base64

    from PIL import Image

    encoded = pages["run"].all("img")[0]["src"] or ""
    image = Image.open(io.BytesIO(base64.b64decode(encoded.partition(",")[2])))
    assert image.size == (112, 112)
