"""Portable arithmetic: one fingerprint at any placement, by any instruction set."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, fault, small_recipe
from test_resume import forget_after, resume

from samestep import CheckpointError, KernelError, Recipe, evaluate
from samestep.api import export
from samestep.api import train as api
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


LICENSE = Path(__file__).parents[1] / "LICENSE"
VIT = {"family": "vit", "patch": 7, "width": 16, "depth": 2, "heads": 2, "dropout": 0.1}
TEXT = {"source": "text", "path": str(LICENSE), "context": 20}
DECODER = {"family": "transformer", "width": 16, "depth": 2, "heads": 2, "dropout": 0.1}
CNN = {"family": "cnn", "channels": [4, 6], "kernels": [5, 3], "hidden": [16]}
RESNET = {"family": "resnet", "channels": [3, 5], "blocks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vit": {"model": VIT},
    "cnn": {
        "model": CNN | {"norm": "batch", "dropout": 0.3},
        "data.augment": {"shift": 1, "flip": 0.5, "mixup": 0.4},
    },
    "resnet": {"model": RESNET},
    "text": {"data": TEXT, "model": DECODER, "optimizer.max_grad_norm": 0.5},
    "lines": {
        "data": TEXT | {"lines": True},
        "model": DECODER,
        "loss.ignore_index": -100,
    },
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
    "lstm": {"model": {"family": "rnn", "cell": "lstm", "hidden": 9}},
    "gru": {"model": {"family": "rnn", "cell": "gru", "hidden": 7, "layers": 2}},
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


def test_a_run_goes_on_with_another_instruction_set(
    train: Train, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("average").changed({"epochs": 2, "model.norm": "batch"})
    whole, run = train(recipe, 1), train(recipe, 2, checkpoint_seconds=0.0)
    earlier, _ = checkpoint.steps(checkpoint.directory_of(run.path))
    forget_after(run.path, earlier)
    monkeypatch.setenv(VARIABLE, supported_isas()[-1])
    resumed = resume(run.path, server, 3, exchange="gloo")
    assert resumed.weights_sha256 == whole.weights_sha256
    assert (
        resumed.history[-1]["validation_loss"] == whole.history[-1]["validation_loss"]
    )


def test_another_version_of_the_specification_is_refused(
    train: Train, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(recipe_of("plain").changed({"schedule": {"name": "constant"}}))
    monkeypatch.setattr(api, "ARITHMETIC", "portable-2")
    with pytest.raises(CheckpointError, match="portable-1 then, portable-2 now"):
        resume(run.path, server, epochs=2)


def test_without_kernels_a_training_ends_before_it_begins(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "v9")
    with pytest.raises(KernelError, match=f"{VARIABLE} must be one of"):
        train(recipe_of("plain"))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_exported_files_predict_the_same(train: Train, norm: str) -> None:
    """Up to 1e-5, since they are executed by the kernels of torch and onnxruntime."""
    run = train(recipe_of("plain").changed({"model.norm": norm}))
    for form in export.SUFFIXES:
        assert export.export(run, form).difference < 1e-5


def test_evaluation_does_not_depend_on_batches_or_workers(
    train: Train, server: ForkServer
) -> None:
    recipe = recipe_of("batch-norm")
    run = train(recipe.changed({"evaluation_batch": 7}), 1)
    other = train(recipe.changed({"evaluation_batch": 250}), 3, exchange="gloo")
    again = evaluate(run, server=server, workers=2)
    assert run.result["test_loss"] == other.result["test_loss"] == again.loss


@pytest.mark.parametrize(
    "placement", [{"profile": 3}, {"prefetch": "off"}, {"balance": "auto"}]
)
def test_nothing_about_a_placement_changes_a_bit(
    train: Train, placement: dict[str, Any]
) -> None:
    recipe = recipe_of("augmented")
    assert train(recipe, 2, **placement).weights_sha256 == train(recipe).weights_sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.groups": [{"match": "bias", "lr_factor": 0.5}]},
        {"optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.01}},
    ],
)
def test_exchanging_activations_instead_of_gradients_changes_no_bit(
    train: Train, train_under: Train, changes: dict[str, Any]
) -> None:
    """Few samples and large matrices; messages and uneven shares carry gradients."""
    sizes = {"global_batch": 24, "micro_batches": 5, "data.train_samples": 900}
    recipe = small_recipe(arithmetic="portable").changed(
        {**sizes, "model.hidden": [70, 40], "loss.label_smoothing": 0.1, **changes}
    )
    alone, slots = train(recipe, 1), train(recipe, 2, balance=(3, 2))
    assert slots.weights_sha256 == alone.weights_sha256
    for workers in (2, 3):
        kill = fault("kill", "update", 30, rank=1)
        run = train_under(recipe, [kill], workers, balance="off")
        assert run.result["restarts"] == 1
        assert run.weights_sha256 == alone.weights_sha256
        assert run.result["test_loss"] == alone.result["test_loss"]
        if workers == 2:
            read, before = (r.history[-1]["bytes_exchanged"] for r in (run, slots))
            assert 0 < read < before
