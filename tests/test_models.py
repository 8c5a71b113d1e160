"""Every model family: the same bits at any placement, and after a kill."""

from typing import Any

import pytest
import torch
from conftest import Train, fault, small_recipe

from samestep import Recipe, models
from samestep.config.model import CnnModel
from samestep.data.dataset import Dataset


FAMILIES: dict[str, dict[str, Any]] = {
    "cnn": {"channels": [3, 4], "kernels": [5, 3], "hidden": [11], "dropout": 0.2},
    "cnn-norm": {"channels": [3], "kernels": [3], "norm": "batch"},
    # With 4 channels oneDNN of torch 2.13 writes beyond its memory, on AVX2 processors.
    "resnet": {"channels": [8, 16], "blocks": 1},
    "lstm": {"cell": "lstm", "hidden": 13, "layers": 2},
    "gru": {"cell": "gru", "hidden": 13},
    "vit": {"patch": 7, "width": 24, "depth": 2, "heads": 3, "dropout": 0.1},
}
NAMES = {"cnn-norm": "cnn", "lstm": "rnn", "gru": "rnn"}


def recipe_of(name: str) -> Recipe:
    fields = small_recipe(global_batch=60, epochs=1, data__train_samples=300).to_dict()
    fields["model"] = {"family": NAMES.get(name, name), **FAMILIES[name]}
    return Recipe.from_dict(fields)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, name: str
) -> None:
    recipe = recipe_of(name)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo"), (4, "shared"), (4, "gloo")):
        kills = [fault("kill", "exchange", 2, rank=1)] if workers < 4 else []
        run = train_under(recipe, kills, workers, exchange=exchange, balance="random")
        assert run.result["restarts"] == len(kills)
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
        assert run.result["noise_scale"] == alone.result["noise_scale"]


def test_batch_norm_of_a_cnn_begins_without_statistics() -> None:
    """Also where the last map is 1 x 1, so that one image has one value per channel."""
    recipe = CnnModel(family="cnn", channels=[4, 5], kernels=[3, 3], norm="batch")
    model = models.build(recipe, Dataset((1, 10, 10), 3, "classification"))
    assert model.training
    for name, buffer in model.named_buffers():
        assert buffer.eq(1 if name.endswith("running_var") else 0).all()
    assert model(torch.randn(2, 1, 10, 10)).shape == (2, 3)
