"""The documents keep their word: built, linked, and their commands carried out.

A fenced block of `console` is a session: lines after `$ ` are typed, the others are
what must appear, where `...` stands for anything. Numbers may differ, since they belong
to a machine; fingerprints that are equal on a page are equal here. The sessions of a
page are one shell in one directory, in which there are examples/ and the blocks that
begin with `# name.py`. Calls of samestep in all other blocks are only parsed by its
command line.
"""

import doctest
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
from documents import PAGES, ROOT, code_blocks, code_spans, commands, links
from sphinx.util.inventory import InventoryFile

import samestep
from samestep.cli.main import cli


SESSIONS = [page for page in PAGES if any(i == "console" for i, _ in code_blocks(page))]
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
FILE = re.compile(r"\b(?:benchmarks|docs|examples|src|tests)/[\w/.-]+\.\w+")
NEXT = "----- next block -----"
TOKEN = re.compile(
    r"(?P<gap>\s*\.\.\.\s*)|(?P<hash>\b[0-9a-f]{64}\b)|(?P<number>\d[\d,.]*)"
    r"|(?P<space>\s+)|(?P<other>.)"
)
SHAPES = {
    "gap": ".*",
    "hash": "([0-9a-f]{64})",
    "number": r"\d[\d,.]*",
    "space": r"\s+",
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", out],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return out


def test_the_site_is_built_without_a_warning_and_needs_no_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loads = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="([^"]+)', page.read_text()
        )
        assert not [address for address in loads if urlsplit(address).netloc]


def test_the_site_has_every_public_name_and_every_option(site: Path) -> None:
    objects = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    known = {name for kind in objects.data.values() for name in kind}
    errors = vars(samestep.errors)
    for public in samestep.__all__:
        module = "samestep.errors" if public in errors else "samestep"
        assert f"{module}.{public}" in known
    for command in cli.commands.values():
        for option in (o for p in command.params for o in p.opts if o[:2] == "--"):
            assert f"samestep-{command.name}.{option}" in known


@pytest.mark.parametrize("page", SESSIONS, ids=name)
def test_a_session_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    blocks = [content for kind, content in code_blocks(page) if kind == "console"]
    script = f"\necho {NEXT}\n".join(typed(block) for block in blocks)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for _, content in code_blocks(page):
        if title := re.match(r"# (\w+\.py)\n", content):
            (tmp_path / title[1]).write_text(content)
    outputs = shell(script, tmp_path).split(f"{NEXT}\n")
    fingerprints: dict[str, str] = {}
    for block, output in zip(blocks, outputs, strict=True):
        shown = "\n".join(line for line in unfolded(block) if line[:2] != "$ ")
        assert_appears(shown, output, fingerprints)


def unfolded(block: str) -> list[str]:
    return block.replace("\\\n", "").splitlines()


def typed(block: str) -> str:
    return "\n".join(line[2:] for line in unfolded(block) if line[:2] == "$ ")


def shell(script: str, home: Path) -> str:
    """Return what a terminal would show."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", script],
        cwd=home,
        env={**os.environ, "PATH": path, "NO_COLOR": "1", "COLUMNS": "120"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return ended.stdout


OF_A_BUSY_MACHINE = re.compile(
    r"^(rebalanced after|worker \d+ runs at|balance {5}| {12}(balanc|too few)).*\n",
    re.MULTILINE,
)
"""Lines that a training prints where other programs slow a worker down."""


def assert_appears(shown: str, output: str, fingerprints: dict[str, str]) -> None:
    """Check that a page shows `output`, apart from what depends on the machine.

    `fingerprints` maps those of the page to those of this machine.
    """
    output = OF_A_BUSY_MACHINE.sub("", output)
    pattern = TOKEN.sub(
        lambda token: SHAPES.get(str(token.lastgroup), re.escape(token[0])), shown
    )
    found = re.fullmatch(pattern, output.strip(), re.DOTALL)
    assert found, f"on the page:\n{shown}\n\nprinted:\n{output}"
    hashes = [token["hash"] for token in TOKEN.finditer(shown) if token["hash"]]
    for page, here in zip(hashes, found.groups(), strict=True):
        assert fingerprints.setdefault(page, here) == here
    assert len(set(fingerprints.values())) == len(fingerprints)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_call_of_samestep_can_be_parsed(page: Path) -> None:
    for words in commands(page, "samestep"):
        arguments = [word for word in words if word != "..."]
        with click.Context(cli, info_name="samestep") as context:
            command, rest = cli.resolve_command(context, arguments)[1:]
            assert command is not None
            command.make_context(command.name, list(rest), parent=context)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_program_of_ours_in_a_block_exists(page: Path) -> None:
    """So each number has the command that measures it."""
    for words in commands(page, "python"):
        if words and words[0].startswith(("benchmarks/", "docs/", "tests/")):
            assert (ROOT / words[0]).exists(), words


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme in ("https", "mailto"), link
            assert "." in parts.netloc or parts.scheme == "mailto", link
        elif parts.path:
            assert (page.parent / parts.path).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_flag_and_file_that_a_sentence_names_exists(page: Path) -> None:
    commands = [cli, *cli.commands.values()]
    params = [param for command in commands for param in command.params]
    flags = {flag for param in params for flag in (*param.opts, *param.secondary_opts)}
    for span in code_spans(page):
        if span.startswith(("--", "samestep ")):
            assert set(FLAG.findall(span)) <= flags | {"--help"}, span
        for path in FILE.findall(span):
            assert (ROOT / path).exists(), span


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_in_the_documents_is_python_and_its_examples_are_true(
    page: Path,
) -> None:
    for language, content in code_blocks(page):
        if language == "python":
            compile(content, page, "exec")
        elif language == "pycon":
            example = doctest.DocTestParser().get_doctest(
                content, {}, page.name, str(page), 0
            )
            failures = io.StringIO()
            doctest.DocTestRunner().run(example, out=failures.write)
            assert not failures.getvalue()
