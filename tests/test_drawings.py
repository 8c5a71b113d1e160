"""The drawings of the documents."""

import re
from xml.etree import ElementTree

import pytest
from make import DOCS, DRAWINGS


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
