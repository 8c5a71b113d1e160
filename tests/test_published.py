"""The published fingerprints of built-in recipes."""

import json

import pytest
from click.testing import CliRunner
from conftest import Train
from golden import FILE

from samestep import Recipe, RecipeError
from samestep.cli.main import cli
from samestep.config import published
from samestep.config.recipe import BUILT_IN, built_in_recipes
from samestep.kernels.interface import ARITHMETIC
from samestep.output.summary import summary


KEPT = json.loads(BUILT_IN.joinpath(published.FILE).read_text())
PORTABLE = [n for n in built_in_recipes() if published.is_published(Recipe.load(n))]


def test_they_are_of_the_recipes_and_the_arithmetic_of_this_version() -> None:
    assert KEPT["arithmetic"] == ARITHMETIC
    assert {n: Recipe.load(n).digest for n in PORTABLE} == {
        name: entry["recipe_sha256"] for name, entry in KEPT["recipes"].items()
    }
    golden = json.loads(FILE.read_text())["outcomes"]["mnist-mlp"]
    assert KEPT["recipes"]["mnist-mlp"]["weights_sha256"] == golden["weights_sha256"]


def test_the_command_prints_one() -> None:
    def printed(*arguments: str) -> str:
        return CliRunner().invoke(cli, ["recipes", *arguments, "--fingerprint"]).output

    expected = KEPT["recipes"]["mnist-mlp"]["weights_sha256"]
    assert printed("mnist-mlp") == f"{expected}\n"
    assert "needs the NAME" in printed()


def test_a_recipe_with_torchs_arithmetic_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Recipe.load("mnist-mlp", {"arithmetic": "torch"})
    assert published.fingerprint(other, "torch") is None
    assert published.fingerprint(other, ARITHMETIC) is None
    monkeypatch.setattr(Recipe, "load", lambda name: other)
    with pytest.raises(RecipeError, match="whose bits depend on the processor"):
        published.of_built_in("mnist-mlp", ARITHMETIC)


def test_a_recipe_whose_text_differs_between_pythons_has_none() -> None:
    with pytest.raises(RecipeError, match="each version of Python"):
        published.of_built_in("chars-transformer", ARITHMETIC)


def test_a_summary_says_whether_the_weights_are_as_published(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"data.train_samples": 256, "epochs": 1, "model.hidden": [8]}
    run = train(Recipe.load("mnist-mlp", changed))
    assert "published" not in summary(run)
    found = ("mnist-mlp", run.weights_sha256)
    monkeypatch.setattr(published, "fingerprint", lambda *_: found)
    assert f"sha256 {run.weights_sha256}, as published\n" in summary(run)
    monkeypatch.setattr(published, "fingerprint", lambda *_: ("mnist-mlp", "0" * 64))
    assert "not as published: mnist-mlp gives 000000" in summary(run)
