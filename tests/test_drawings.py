"""The drawings of the documents."""

import re
from xml.etree import ElementTree

import pytest
from make import DOCS, DRAWINGS
from screen import Screen


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_what_its_script_draws(name: str) -> None:
    drawn = (DOCS / name).read_text(encoding="utf-8")
    assert drawn == DRAWINGS[name](), "Run `python docs/drawings/make.py`."


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_told_in_words_follows_the_dark_scheme_and_runs_nothing(
    name: str,
) -> None:
    source = (DOCS / name).read_text(encoding="utf-8")
    root = ElementTree.fromstring(source)  # noqa: S314
    assert root.attrib["aria-label"].endswith(".")
    assert "@media(prefers-color-scheme:dark)" in source
    elements = {element.tag.split("}")[1] for element in root.iter()}
    assert elements <= {
        "svg",
        "style",
        "g",
        "rect",
        "circle",
        "text",
        "path",
        "polygon",
    }
    assert not re.search(r"href|url\(|\bon[a-z]+=", source)


def test_the_step_moves_only_for_those_who_want_motion() -> None:
    source = (DOCS / "step.svg").read_text(encoding="utf-8")
    still, moving = source.split("@media(prefers-reduced-motion:no-preference)")
    assert "animation" not in still
    assert "@keyframes" in moving


def test_the_recorded_terminal_shows_a_killed_worker_and_equal_fingerprints() -> None:
    source = (DOCS / "terminal.svg").read_text(encoding="utf-8")
    still = "\n".join(re.findall(r">([^<>]*)</text>", source))
    assert "killed by SIGKILL" in still
    found = re.findall("sha256 [0-9a-f]{64}", still)
    assert len(found) == 2
    assert found[0] == found[1]
    assert still.splitlines()[-1] == "identical"


def test_a_screen_shows_what_is_left_after_erasing_and_moving_up() -> None:
    screen = Screen(columns=8)
    screen.write("one\r\n\x1b[1;36mtwo\x1b[0m!\x1b[2K\x1b[1A\x1b[2K\rthree to ten\r\n")
    shown = ["".join(letter for letter, _ in line) for line in screen.lines]
    assert shown == ["three to", " ten", ""]
    with pytest.raises(ValueError, match="unknown"):
        screen.write("\x1b[5B")
