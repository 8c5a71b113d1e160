"""Fingerprints of portable arithmetic, which are those of every processor.

One of them changes when a bit of a training changes anywhere. Then either a kernel is
wrong, or the specification needs a new version (CONTRIBUTING.md, "The kernels").
"""

import json
import re
from pathlib import Path

import pytest
from conftest import Train
from golden import FILE, LARGE, PUBLISHED, SMALL, outcome

from samestep.kernels.interface import ARITHMETIC
from samestep.kernels.library import VARIABLE, supported_isas


GOLDEN = json.loads(FILE.read_text())
README = Path(__file__).parents[1] / "README.md"


def test_the_fingerprints_are_of_this_version_of_the_specification() -> None:
    assert GOLDEN["arithmetic"] == ARITHMETIC
    assert GOLDEN["outcomes"].keys() == (LARGE | SMALL).keys()


@pytest.mark.parametrize("isa", [isa for isa in supported_isas() if isa != "v2"])
@pytest.mark.parametrize("name", LARGE)
def test_a_built_in_recipe_has_its_fingerprint(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str, isa: str
) -> None:
    monkeypatch.setenv(VARIABLE, isa)
    assert outcome(train(LARGE[name], 2)) == GOLDEN["outcomes"][name]


@pytest.mark.parametrize("name", SMALL)
def test_every_kind_of_recipe_has_its_fingerprint_with_any_instruction_set(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for isa in supported_isas():
        monkeypatch.setenv(VARIABLE, isa)
        assert outcome(train(SMALL[name])) == GOLDEN["outcomes"][name], isa


def test_the_readme_shows_the_published_fingerprints() -> None:
    shown = set(re.findall(r"\b[0-9a-f]{64}\b", README.read_text()))
    recipes = json.loads(PUBLISHED.read_text())["recipes"]
    assert shown == {entry["weights_sha256"] for entry in recipes.values()}
    assert (
        recipes["mnist-mlp"]["weights_sha256"]
        == GOLDEN["outcomes"]["mnist-mlp"]["weights_sha256"]
    )
