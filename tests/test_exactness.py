"""The promise: the recipe fixes the result. Real processes, real sockets, real data."""

from typing import Any

import pytest
import torch
from conftest import Train, small_recipe
from torch import nn

from samestep import Recipe, Run, models
from samestep.config.optimizer import AdamWRecipe
from samestep.core.lr_schedule import learning_rate
from samestep.core.plan import Plan, derive_seed
from samestep.data.dataset import load
from samestep.state.fingerprint import fingerprint
from samestep.state.flat import Flat


RECIPES = {
    "default": {},
    "seven-of-200": {"global_batch": 200, "micro_batches": 7},
    "short-last-batch-with-empty-pieces": {"data__train_samples": 961},
    "clipped": {"optimizer__max_grad_norm": 0.05, "optimizer__weight_decay": 0.3},
    "sgd": {"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True}},
    "adam-with-l2": {"optimizer": {"name": "adam", "lr": 0.003, "weight_decay": 1e-3}},
    "without-validation": {"data__validation": 0, "epochs": 2},
    "two-threads": {"threads": 2},
    "batch-norm": {
        "model__norm": "batch",
        "optimizer__max_grad_norm": 1.0,
        "epochs": 2,
    },
}


def results(run: Run) -> dict[str, Any]:
    """Return everything that must not depend on the placement."""
    measured = (
        *("seconds", "samples_per_second", "minor_faults_per_step"),
        *(
            "seconds_by_phase",
            "workers",
            "waited_for",
            "bytes_exchanged",
            "network_bytes",
        ),
        *("communication_share", "straggler_share"),
    )
    kept = [
        {key: value for key, value in epoch.items() if key not in measured}
        for epoch in run.history
    ]
    final = (
        *("test_loss", "test_accuracy", "test_confusion", "test_worst"),
        *("noise_scale", "weights_sha256"),
    )
    return {"epochs": kept} | {key: run.result[key] for key in final}


@pytest.mark.parametrize("overrides", RECIPES.values(), ids=RECIPES.keys())
def test_the_result_is_the_same_at_several_numbers_of_workers(
    train: Train, overrides: dict[str, Any]
) -> None:
    recipe = small_recipe(**overrides)
    alone = results(train(recipe, workers=1))
    for workers in (2, 3, recipe.micro_batches):
        for exchange in ("shared", "gloo"):
            assert results(train(recipe, workers, exchange=exchange)) == alone


@pytest.mark.parametrize("workers", [4, 5])
def test_no_number_of_workers_is_special(train: Train, workers: int) -> None:
    recipe = small_recipe()
    alone = results(train(recipe, 1, exchange="gloo"))
    for exchange in ("shared", "gloo"):
        assert results(train(recipe, workers, exchange=exchange)) == alone


def test_the_full_network_agrees_with_two_workers(train: Train) -> None:
    overrides = {"data.train_samples": 3000, "epochs": 1, "micro_batches": 8}
    recipe = Recipe.load("mnist-mlp-classic", overrides)
    alone = results(train(recipe, 1))
    assert results(train(recipe, 2)) == alone
    assert results(train(recipe, 2, exchange="gloo")) == alone


def test_another_seed_gives_other_weights(train: Train) -> None:
    one, other = train(small_recipe(seed=1)), train(small_recipe(seed=2))
    assert one.weights_sha256 != other.weights_sha256


def by_hand(recipe: Recipe) -> str:
    """Train in one process, one batch at a time, with torch's own parts."""
    loaded = load(recipe.data)
    data = loaded.splits["train"]
    torch.manual_seed(derive_seed(recipe.seed, "model"))
    model = models.build(recipe.model, loaded)
    hyper = recipe.optimizer
    assert isinstance(hyper, AdamWRecipe)
    flat = Flat(model)
    vector = nn.Parameter(torch.zeros(flat.size))
    flat.bind(vector.data, write=True)
    vector.grad = torch.zeros(flat.size)
    optimizer = torch.optim.AdamW(
        [vector],
        betas=hyper.betas,
        weight_decay=hyper.weight_decay,
        fused=True,
    )
    plan = Plan(len(data), recipe.global_batch, 1, recipe.seed)
    criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.05)
    for step in range(plan.steps_per_epoch):
        inputs, targets = data.gather(plan.micro_batch(plan.order(0), step, 0))
        torch.manual_seed(derive_seed(recipe.seed, "step", step, 0))
        optimizer.param_groups[0]["lr"] = learning_rate(
            recipe.schedule, hyper.lr, step, plan.steps_per_epoch, plan.steps_per_epoch
        )
        model.zero_grad()
        (criterion(model(inputs), targets) / len(targets)).backward()
        gradients = [p.grad for p in flat.parameters if p.grad is not None]
        torch._foreach_copy_(flat.views(vector.grad), gradients)
        optimizer.step()
    return fingerprint(model.state_dict())


def test_with_one_micro_batch_it_is_the_plain_training_loop(train: Train) -> None:
    recipe = small_recipe(micro_batches=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        assert by_hand(recipe) == train(recipe).weights_sha256
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
