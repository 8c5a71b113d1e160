"""Portable arithmetic: one fingerprint at any placement, by any instruction set."""

import json
from typing import Any

import pytest
from conftest import Train, fault, small_recipe

from samestep import Recipe
from samestep.kernels.library import VARIABLE, supported_isas


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-norm": {"model.norm": "batch"},
    "clipping": {"optimizer.max_grad_norm": 0.5},
    "sgd": {
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    },
    "adam": {"optimizer": {"name": "adam", "lr": 0.001, "weight_decay": 0.01}},
    "average": {"ema": {"decay": 0.9}},
    "smoothing": {"loss.label_smoothing": 0.1},
    "uneven": {"micro_batches": 7, "global_batch": 90},
    "groups": {"optimizer.groups": [{"match": "bias", "lr_factor": 0.5}]},
    "ignored": {"loss.ignore_index": 3},
    "augmented": {"data.augment": {"shift": 2}},
    "early": {
        "epochs": 3,
        "data.validation": 500,
        "early_stopping": {"patience": 1, "restore_best": True},
    },
}
"""What each small recipe has besides a multi-layer perceptron with dropout."""


def recipe_of(kind: str) -> Recipe:
    return small_recipe(arithmetic="portable").changed(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, kind: str
) -> None:
    recipe = recipe_of(kind)
    alone = train(recipe, 1)
    assert alone.result["arithmetic"] == "portable-1"
    for workers, exchange in ((2, "shared"), (3, "gloo"), (5, "shared"), (2, "gloo")):
        kills = [fault("kill", "exchange", 2, rank=1)] if workers == 3 else []
        run = train_under(recipe, kills, workers, exchange=exchange, balance="random")
        assert run.result["restarts"] == len(kills)
        for name in ("weights_sha256", "test_loss", "noise_scale"):
            assert run.result[name] == alone.result[name]


@pytest.mark.parametrize("isa", supported_isas()[1:])
def test_an_instruction_set_changes_no_bit(
    train: Train, monkeypatch: pytest.MonkeyPatch, isa: str
) -> None:
    best = train(recipe_of("batch-norm"), 2)
    monkeypatch.setenv(VARIABLE, isa)
    forced = train(recipe_of("batch-norm"), 1)
    events = map(json.loads, (forced.path / "events.jsonl").read_text().splitlines())
    (started,) = [event for event in events if event["event"] == "training"]
    assert started["instruction_set"] == isa
    assert forced.weights_sha256 == best.weights_sha256
    assert forced.result["test_loss"] == best.result["test_loss"]
