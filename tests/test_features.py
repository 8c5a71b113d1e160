"""What a recipe may ask for besides the usual: the promise holds for all of it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from conftest import Train, fault, small_recipe
from documents import ROOT, code_blocks
from safetensors.torch import load_file
from test_exactness import results
from test_resume import forget_after, resume
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import samestep
from samestep import Recipe, RecipeError, Run
from samestep.config import bf16
from samestep.config.training import EarlyStoppingRecipe
from samestep.core.progress import Stopping
from samestep.models import compiling
from samestep.optim.averaging import WeightAverages, vectors
from samestep.state import checkpoint
from samestep.state.fingerprint import fingerprint
from samestep.state.flat import Flat
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import machine


NORM = {"model__norm": "batch"}
FEATURES: dict[str, dict[str, Any]] = {
    "no-decay-and-groups": NORM
    | {
        "optimizer__weight_decay": 0.3,
        "optimizer__decay_norms_and_biases": False,
        "optimizer__groups": [
            {"match": r"^layers\.0\.", "lr_factor": 0.1},
            {"match": "weight$", "lr_factor": 2.0, "weight_decay": 0.1},
        ],
    },
    "freeze": {"freeze": [r"^layers\.1", r"^norms\.0\.bias"], **NORM},
    "bf16": {"precision": "bf16", "model__hidden": [64, 32]},
    "float64": NORM
    | {
        "precision": "float64",
        "optimizer__max_grad_norm": 0.05,
        "ema__decay": 0.9,
        "early_stopping": {"patience": 9},
    },
    "muon": {
        "optimizer": {"name": "muon", "lr": 0.02, "max_grad_norm": 1.0},
        "model__hidden": [64, 32, 48, 32],
    },
    "adagrad": {"epochs": 2, "optimizer": {"name": "adagrad", "lr": 0.02}},
    "rmsprop": {
        "epochs": 2,
        "optimizer": {"name": "rmsprop", "lr": 1e-3, "momentum": 0.9},
    },
    "adafactor": {
        "epochs": 2,
        "optimizer": {"name": "adafactor", "lr": 0.05, "max_grad_norm": 1.0},
    },
    "lion": NORM
    | {"epochs": 2, "optimizer": {"name": "lion", "lr": 1e-4, "weight_decay": 0.1}},
    "lamb": {
        "epochs": 2,
        "optimizer": {
            "name": "lamb",
            "lr": 0.01,
            "weight_decay": 0.1,
            "decay_norms_and_biases": False,
        },
        **NORM,
    },
    "schedule-free": {
        "epochs": 2,
        "optimizer": {"name": "schedule-free-adamw", "lr": 0.01},
        "schedule": {"name": "constant", "warmup_epochs": 0.5},
        "early_stopping": {"patience": 9},
    },
    "ema-and-early-stopping": NORM
    | {
        "epochs": 9,
        "ema__decay": 0.9,
        "early_stopping": {"patience": 1, "min_delta": 0.05},
        "optimizer__lr": 0.03,
    },
}


def final(run: Run) -> tuple[dict[str, Any], bytes]:
    return results(run), (run.path / "model.safetensors").read_bytes()


PRECISIONS = ("float32", "bf16") if bf16.instructions() else ("float32",)
needs_bf16 = pytest.mark.skipif(not bf16.instructions(), reason="no bf16 here")


def features() -> list[ParameterSet]:
    found = []
    for name, overrides in FEATURES.items():
        marks = [needs_bf16] if overrides.get("precision") == "bf16" else []
        found.append(pytest.param(overrides, id=name, marks=marks))
    return found


def test_the_result_of_a_schedule_free_training_is_its_average(train: Train) -> None:
    recipe = small_recipe(epochs=2).changed({"optimizer.name": "schedule-free-adamw"})
    betas = recipe.to_dict()["optimizer"]["betas"]
    run = train(recipe, 2)
    newest = checkpoint.steps(checkpoint.directory_of(run.path))[-1]
    path = checkpoint.path_of(checkpoint.directory_of(run.path), newest)
    states, weights = (
        load_file(path / "optimizer.safetensors"),
        load_file(run.model_file),
    )
    trained = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        assert weight.equal(states[f"ema/{name}"])
        y = states[f"z/{name}"].lerp(weight, betas[0])
        assert_close(trained[name], y, rtol=1e-6, atol=1e-8)  # but for vectors' ends
        assert not trained[name].equal(weight)


@pytest.mark.parametrize("overrides", features())
def test_neither_workers_nor_kills_nor_a_resume_change_a_bit(
    train: Train,
    train_under: Train,
    server: ForkServer,
    overrides: dict[str, Any],
) -> None:
    recipe = small_recipe(**{"epochs": 4} | overrides)
    whole = final(train(recipe, 1))

    broken = train(recipe, 2, exchange="gloo", keep_checkpoints=2)
    assert final(broken) == whole
    first, *_ = checkpoint.steps(checkpoint.directory_of(broken.path))
    forget_after(broken.path, first)
    assert final(resume(broken.path, server, 3, exchange="gloo")) == whole

    kills = [fault("kill", "update", 9, rank=1), fault("kill", "forward", 12, 0, 2)]
    killed = train_under(recipe, kills, 3, exchange="shared")
    assert final(killed) == whole
    measured = samestep.evaluate(killed, workers=2, server=server)
    assert measured.loss == killed.result["test_loss"]
    assert measured.weights_sha256 == killed.weights_sha256
    assert killed.result["restarts"] == 2


def test_compiled_code_has_the_same_bits_at_any_number_of_workers(train: Train) -> None:
    small = {"micro_batches": 5, "data__train_samples": 480, "model__hidden": [8]}
    recipe = small_recipe(compile=True, precision=PRECISIONS[-1], **small, **NORM)
    alone = results(train(recipe, 1, exchange="gloo"))
    assert results(train(recipe, 2, exchange="shared")) == alone


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(RecipeError, match="there is no `no-compiler`: install one"):
        compiling.compiled(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_the_environment_does_not_leave_out_compiling(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(RecipeError, match=f"`{name}` in the environment turns it off"):
        compiling.compiled(nn.Linear(1, 1))


class Alone:
    """An exchange with oneself."""

    def __init__(self, flat: Flat) -> None:
        self.parameters, self.owned = torch.zeros(flat.size), (0, flat.size)
        self.states = list(torch.zeros(len(flat.layout.states), flat.size))
        flat.bind(self.parameters, write=True)

    def all_gather_parameters(self) -> None:
        """Do nothing: nobody waits."""


def test_the_average_is_that_of_torch() -> None:
    recipe = small_recipe(ema__decay=0.7)
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    flat = Flat(model, vectors(recipe))
    exchange: Any = Alone(flat)
    averages = WeightAverages(recipe, flat, exchange)
    ema: Any = get_ema_multi_avg_fn(0.7)  # type: ignore[no-untyped-call]
    average: Any = AveragedModel(model, multi_avg_fn=ema)
    for step in range(5):
        exchange.parameters.add_(torch.randn(flat.size))
        average.update_parameters(model)
        averages.advance(step)
    trained = model.weight.clone()
    with averages.applied():
        assert model.weight.equal(average.module.weight)
    assert model.weight.equal(trained)


def test_the_result_of_an_early_end_is_its_best_epoch(train: Train) -> None:
    recipe = small_recipe(epochs=9, optimizer__lr=0.03, model__norm="batch")
    stopping = recipe.changed({"early_stopping": {"patience": 2, "min_delta": 0.1}})
    run, whole = train(stopping, 2), train(recipe, 1)
    best = run.result["best_epoch"] - 1
    assert best + 1 + 2 == len(run.history) < 9
    assert run.weights_sha256 == run.history[best]["weights_sha256"]
    assert fingerprint(run.load_model().state_dict()) == run.weights_sha256
    shas = [epoch["weights_sha256"] for epoch in run.history]
    assert shas == [epoch["weights_sha256"] for epoch in whole.history][: len(shas)]


def test_patience_counts_epochs_without_an_improvement() -> None:
    stop, stopping = EarlyStoppingRecipe(patience=2, min_delta=0.1), Stopping()
    values = enumerate((1, 0.95, 0.8))
    best = [stopping.observe(stop, value, epoch, 9) for epoch, value in values]
    assert best == [True, False, True]
    assert (stopping.waited, stopping.best_epoch) == (0, 2)
    upwards = EarlyStoppingRecipe(metric="validation_accuracy")
    best = [Stopping(best=0.5).observe(upwards, value, 1, 9) for value in (0.4, 0.6)]
    assert best == [False, True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"early_stopping__patience": 0},
            "`early_stopping.patience`: input should be greater",
        ),
        (
            {"early_stopping__patiense": 1},
            "field `early_stopping.patiense`. Did you mean `early_stopping.patience`?",
        ),
        ({"early_stopping": {}, "data__validation": 0}, "`data.validation` is 0"),
        ({"ema__decay": 1.0}, "`ema.decay`: input should be less than 1"),
        (
            {"ema": {}, "optimizer": {"name": "schedule-free-adamw", "lr": 0.1}},
            "a schedule-free optimizer averages the weights itself",
        ),
        (
            {"arithmetic": "portable", "optimizer": {"name": "lion", "lr": 0.1}},
            "no kernels for `optimizer.name = lion` (only for sgd, adam, adamw)",
        ),
        ({"optimizer__groups": [{"match": "("}]}, "`(` is not a regular expression"),
    ],
)
def test_a_wrong_field_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        small_recipe(**overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"early_stopping": {"metric": "validation_absolute_error"}},
            "validation_loss or validation_accuracy; received",
        ),
        (
            {"optimizer__groups": [{"match": "head"}]},
            r"`head` matches none of layers\.0\.weight, ",
        ),
    ],
)
def test_what_does_not_fit_the_model_or_data_is_named(
    train: Train, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(small_recipe(**overrides))


def test_bf16_needs_instructions_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    recipe = small_recipe(precision="bf16")
    with pytest.raises(RecipeError, match=r"this one has none\. Use `float32`"):
        bf16.check(recipe)
    machine.CPUINFO.write_text("model name : x\nflags\t\t: fpu avx512f\n")
    assert bf16.instructions() == []
    machine.CPUINFO.write_text("model name : x\nflags\t\t: fpu amx_bf16 avx512_bf16\n")
    bf16.check(recipe)
    assert bf16.conditions(recipe) == {"bf16": "amx_bf16 avx512_bf16"}
    assert bf16.conditions(small_recipe()) == {}


@needs_bf16
def test_bf16_rounds_products_and_nothing_else(train: Train) -> None:
    run = train(small_recipe(precision="bf16", epochs=3, optimizer__lr=0.01))
    plain = train(small_recipe(epochs=3, optimizer__lr=0.01))
    assert run.weights_sha256 != plain.weights_sha256
    accuracies = [each.result["test_accuracy"] for each in (run, plain)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)
    weights = load_file(run.model_file)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_the_examples_of_the_page_are_recipes() -> None:
    blocks = code_blocks(ROOT / "docs" / "recipes.md")
    examples = [content for language, content in blocks if language == "toml"]
    assert len(examples) == 12
    plain = Recipe.load("mnist-mlp", {"arithmetic": "torch"})
    for example in examples:
        fields: dict[str, Any] = {"arithmetic": "torch"}
        for name, value in tomllib.loads(example).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            fields |= {f"{name}.{key}".rstrip("."): each for key, each in inner}
        recipe = Recipe.load("mnist-mlp", fields)
        assert recipe.digest != plain.digest
        assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
