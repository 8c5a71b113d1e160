"""Trainings that start from given weights."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Train, small_recipe
from safetensors.torch import load_file
from test_exactness import results
from test_features import NORM
from test_resume import forget_after, resume
from torch import nn

import samestep
from samestep import RecipeError, Run
from samestep.config.training import InitRecipe
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.training import init_weights


@pytest.mark.parametrize("kind", ["run", "safetensors", "state_dict", "checkpoint"])
def test_a_training_starts_from_given_weights(
    given: Run, train: Train, tmp_path: Path, kind: str
) -> None:
    weights, path = load_file(given.model_file), tmp_path / "given.pt"
    match kind:
        case "run":
            path = given.path
        case "safetensors":
            path = given.model_file
        case "state_dict":
            torch.save(weights, path)
        case "checkpoint":
            torch.save({"epoch": 3, "state_dict": weights}, path)
    recipe = small_recipe(init__weights=str(path), freeze=["layers"], **NORM)
    run = train(recipe, 2)
    after = load_file(run.model_file)
    assert after["layers.0.weight"].equal(weights["layers.0.weight"])
    assert not after["norms.0.weight"].equal(weights["norms.0.weight"])
    assert run.recipe.init is not None
    assert run.recipe.init.sha256 is not None
    again = (
        train(run.recipe.changed({"init.weights": str(given.model_file)}), 1)
        if (kind == "run")
        else run
    )
    assert results(again) == results(run)


@pytest.fixture(scope="module")
def given(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained model with norms."""
    out = tmp_path_factory.mktemp("given") / "run"
    recipe = small_recipe(model__norm="batch", name="given")
    where = samestep.Placement(workers=1, out=out)
    return samestep.train(recipe, where, view=SilentView(), server=server)


def test_a_run_goes_on_only_with_the_weights_that_it_started_from(
    given: Run, train: Train, server: ForkServer, tmp_path: Path
) -> None:
    path = tmp_path / "given.safetensors"
    path.write_bytes(given.model_file.read_bytes())
    recipe = small_recipe(init__weights=str(path), freeze=["layers.0"], **NORM)
    run = train(recipe, 2)
    whole = results(run)
    forget_after(run.path, checkpoint.steps(checkpoint.directory_of(run.path))[-1])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(RecipeError, match="Bring back that file"):
        resume(run.path, server)
    path.write_bytes(content)
    assert results(resume(run.path, server)) == whole


def test_a_new_head_is_drawn_and_the_rest_is_given(given: Run, train: Train) -> None:
    init = {"weights": str(given.path), "reinit": [r"^layers\.1", r"^norms\.1", "2.w"]}
    run = train(small_recipe(init=init, model__norm="batch", model__hidden=[37, 8]))
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__hidden": [37, 8]},
            r"other shapes: layers.1.weight \[19, 37\] inst",
        ),
        ({"model__hidden": [37]}, r"unknown to the model: .*norms.1.bias"),
        ({"model__norm": "none"}, r"are unknown to the model: norms.0.bias"),
        ({"init__reinit": ["head"]}, r"in `init.reinit` must match .*; `head` matches"),
        ({"init__sha256": "0" * 64}, r"must have the SHA-256 0000"),
        ({"init__weights": "/nowhere"}, r"/nowhere cannot be read: No such file"),
        ({"freeze": ["layer", "norm"]}, r"`freeze` matches all of layers.0.weight"),
        ({"optimizer": {"name": "muon", "lr": 1, "matrices": ["bias"]}}, "none among"),
        ({"freeze": ["head"]}, r"in `freeze` must match .*; `head` matches none"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    given: Run, train: Train, overrides: dict[str, Any], message: str
) -> None:
    fields = {"init__weights": str(given.path), "model__norm": "batch"} | overrides
    with pytest.raises(RecipeError, match=message):
        train(small_recipe(**fields))


def test_a_file_that_is_no_state_dict_is_refused(train: Train, tmp_path: Path) -> None:
    for content in (b"", b"text", pickle.dumps(print)):
        path = tmp_path / "given.pt"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match="cannot be read as such"):
            init_weights.load(nn.Linear(1, 1), InitRecipe(weights=str(path)))
    torch.save([1, 2], path)
    with pytest.raises(RecipeError, match="tensors by name"):
        init_weights.load(nn.Linear(1, 1), InitRecipe(weights=str(path)))
