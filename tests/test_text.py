"""Text: windows, baselines, models of the next character, and sampling from them."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train, fault, small_recipe
from hypothesis import given
from hypothesis import strategies as st

from samestep import Recipe, RecipeError, Run
from samestep.api import sample
from samestep.config.data import TextData
from samestep.data import dataset
from samestep.data.sources import text
from samestep.errors import DataError, RunError


MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"width": 16, "depth": 2, "heads": 2, "dropout": 0.1},
    "rnn": {"cell": "lstm", "hidden": 12},
}


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("the cat sat on the mat, and the rat ate it. äöü\n" * 60)
    return path


def recipe_of(family: str, book: Path) -> Recipe:
    fields = small_recipe(global_batch=15, evaluation_batch=4).to_dict()
    fields["data"] = {"source": "text", "path": str(book), "context": 20}
    fields["model"] = {"family": family, **MODELS[family]}
    return Recipe.from_dict(fields)


@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_text_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, book: Path, family: str
) -> None:
    recipe = recipe_of(family, book)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo"), (4, "shared"), (4, "gloo")):
        kills = [fault("kill", "exchange", 2, rank=1)] if workers < 4 else []
        run = train_under(recipe, kills, workers, exchange=exchange, balance="random")
        assert run.result["restarts"] == len(kills)
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
    assert 0 < alone.result["test_loss"] < math.log(40)
    assert alone.history[0]["samples_per_second"] > 0


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=60, max_size=200),
    st.integers(1, 5),
)
def test_windows_are_disjoint_and_give_back_the_text(
    tmp_path_factory: pytest.TempPathFactory, written: str, context: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "any.txt"
    path.write_bytes(written.encode())
    whole = path.read_text(encoding="utf-8")  # with universal newlines
    if len(whole) < 4 * context:
        return
    found = text.read(TextData(path=str(path), context=context))
    assert found.written(found.tokens) == whole
    ranges = [found.windows[name] for name in ("train", "validation", "test")]
    assert ranges[0][0] == 0
    assert all(first[1] == then[0] for first, then in pairwise(ranges))
    assert all(first < end for first, end in ranges)
    assert ranges[-1][1] * context < len(whole)


@given(
    st.lists(st.text(st.sampled_from("abc\n"), max_size=30), min_size=1, max_size=9),
    st.integers(1, 7),
)
def test_lines_are_padded_and_give_back_every_line(
    tmp_path_factory: pytest.TempPathFactory, written: list[str], context: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "any.txt"
    path.write_text("\n".join(written))
    lines = [line for line in path.read_text().split("\n") if line]
    try:
        data = dataset.load(TextData(path=str(path), context=context, lines=True))
    except DataError:
        assert sum(len(line) // context + 1 for line in lines) < 3
        return
    found = text.read(TextData(path=str(path), context=context, lines=True))
    read = ""
    for split in data.splits.values():
        inputs, targets = split.gather(torch.arange(len(split)))
        is_target = targets >= 0
        assert targets[~is_target].eq(-100).all()
        assert inputs[~is_target].eq(0).all()
        assert inputs[:, 1:][is_target[:, 1:]].equal(targets[:, :-1][is_target[:, 1:]])
        read += found.written(targets[is_target].numpy().astype(np.int32))
    assert read == "".join(f"{line}\n" for line in lines)


def test_lines_have_one_fingerprint_at_any_placement(
    train: Train, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{'ab' * (i * i % 13)}{i}\n" for i in range(60)))
    fields = recipe_of("rnn", names).to_dict()
    fields["data"] |= {"lines": True, "context": 9}
    with pytest.raises(
        RecipeError, match=r"`loss\.ignore_index = -100`; received None"
    ):
        Recipe.from_dict(fields)
    fields["loss"] = {"name": "cross-entropy", "ignore_index": -100}
    recipe = Recipe.from_dict(fields)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
    assert sample.sample(alone, "\n", 12, 0.0, seed=1).startswith("\n")


def test_the_baselines_are_what_simple_methods_reach(book: Path) -> None:
    found = text.read(TextData(path=str(book), context=20))
    bits = text.baselines(found)
    assert bits["gzip"] < bits["unigram"] < math.log2(len(found.vocabulary))


def test_a_folder_is_read_in_the_order_of_paths(tmp_path: Path) -> None:
    for name, content in (("b.py", "two" * 90), ("a.py", "one" * 90), ("c.md", "no")):
        (tmp_path / name).write_text(content)
    found = text.read(TextData(path=str(tmp_path), context=8))
    whole = found.written(found.tokens)
    assert whole == "one" * 90 + "two" * 90


def test_text_that_cannot_be_used_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 99)
    (tmp_path / "short.txt").write_text("short")
    for name, words in (
        ("latin.txt", "UTF-8.*byte 3"),
        ("short.txt", "5 characters"),
        ("missing.txt", "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            text.read(TextData(path=str(tmp_path / name)))
    with pytest.raises(DataError, match="No file"):
        text.read(TextData(path=str(tmp_path), pattern="*.html"))


@pytest.mark.parametrize("family", MODELS)
def test_a_trained_model_writes_the_same_text_for_the_same_seed(
    train: Train, book: Path, family: str
) -> None:
    run = train(recipe_of(family, book), 2)
    written = sample.sample(run, "the ", 30, 0.8, seed=1)
    assert written.startswith("the ")
    assert len(written) == 34
    assert written == sample.sample(run, "the ", 30, 0.8, seed=1)
    assert written != sample.sample(run, "the ", 30, 0.8, seed=2)
    with pytest.raises(RunError, match="'Z'"):
        sample.sample(run, "Z", 5, 0.0, seed=1)


def test_only_a_finished_model_of_text_writes(train: Train, book: Path) -> None:
    with pytest.raises(RunError, match=r"`data.source` is `text`.*`mnist`"):
        sample.sample(train(small_recipe()), "a", 5, 0.0, seed=1)
    run = train(recipe_of("rnn", book))
    failed = Run(run.path, {"status": "failed"})
    with pytest.raises(RunError, match="has no final weights: its status is failed"):
        sample.sample(failed, "a", 5, 0.0, seed=1)
