"""The gradient noise scale: the estimate, and that it does not see the placement."""

import json
from typing import Any

import pytest
import torch
from conftest import Train, small_recipe
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from samestep import models
from samestep.config.recipe import Recipe
from samestep.core import gradient_noise
from samestep.core.plan import Plan, derive_seed
from samestep.core.progress import DECAY, Noise
from samestep.data import dataset


sizes_ = st.lists(st.integers(0, 9), min_size=2, max_size=9).filter(
    lambda sizes: sum(size > 0 for size in sizes) > 1
)
positive = st.floats(1e-3, 1e3)


@given(sizes_, positive, positive)
def test_norms_as_expected_give_back_signal_and_variance(
    sizes: list[int], signal: float, variance: float
) -> None:
    batch = sum(sizes)
    squares = [
        (size / batch) ** 2 * (signal + variance / size) if size else 0.0
        for size in sizes
    ]
    found = gradient_noise.estimate(squares, sizes, signal + variance / batch)
    assert found == pytest.approx((signal, variance), rel=1e-6, abs=1e-6)


def test_the_estimate_agrees_with_the_covariance_of_single_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    single = torch.randn(2_000, 5, generator=generator, dtype=torch.float64)
    single += torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5])
    signal = single.mean(dim=0).square().sum().item()
    variance = single.var(dim=0, correction=0).sum().item()
    sizes, found = [6, 5, 5], []
    for _ in range(4_000):
        drawn = torch.randint(len(single), (16,), generator=generator)
        parts = [p.sum(dim=0) / 16 for p in torch.split(single[drawn], sizes)]
        squares = [part.square().sum().item() for part in parts]
        whole = torch.stack(parts).sum(dim=0).square().sum().item()
        found.append(gradient_noise.estimate(squares, sizes, whole))
    means = torch.tensor(found, dtype=torch.float64).mean(dim=0)
    assert means[0].item() == pytest.approx(signal, rel=0.05)
    assert means[1].item() == pytest.approx(variance, rel=0.02)


def test_the_scale_is_the_ratio_of_decaying_means() -> None:
    sums = Noise()
    for signal, variance in ((1.0, 10.0), (-1.0, 14.0), (3.0, 12.0)):
        sums.add(signal, variance)
    weights = [DECAY**2, DECAY, 1.0]
    signal = sum(w * v for w, v in zip(weights, (1.0, -1.0, 3.0), strict=True))
    variance = sum(w * v for w, v in zip(weights, (10.0, 14.0, 12.0), strict=True))
    assert sums.scale == pytest.approx(variance / signal)


def test_there_is_no_scale_without_a_signal() -> None:
    assert Noise().scale is None
    assert Noise(signal=-0.1, variance=1.0).scale is None
    assert Noise(signal=1.0, variance=-1.0).scale is None


def test_a_training_reports_the_noise_of_its_own_gradients(train: Train) -> None:
    recipe = small_recipe(model__dropout=0.0, loss__label_smoothing=0.0)
    run = train(recipe, 2)
    (epoch,) = run.history
    assert epoch["noise_scale"] == pytest.approx(_first_scale(recipe), rel=1e-3)
    assert run.result["noise_scale"] == epoch["noise_scale"]


def _first_scale(recipe: Recipe) -> float:
    """Return the noise scale of the first step, with plain torch."""
    data = dataset.load(recipe.data)
    train = data.splits["train"]
    plan = Plan(len(train), recipe.global_batch, recipe.micro_batches, recipe.seed)
    torch.default_generator.manual_seed(derive_seed(recipe.seed, "model"))
    model = models.build(recipe.model, data)
    parameters = list(model.parameters())
    parts = []
    for index in range(recipe.micro_batches):
        inputs, targets = train.gather(plan.micro_batch(plan.order(0), 0, index))
        loss = cross_entropy(model(inputs), targets, reduction="sum")
        gradients = torch.autograd.grad(loss / recipe.global_batch, parameters)
        parts.append(torch.cat([g.flatten() for g in gradients]).double())
    signal, variance = gradient_noise.estimate(
        [part.square().sum().item() for part in parts],
        plan.micro_batch_sizes(0),
        torch.stack(parts).sum(dim=0).square().sum().item(),
    )
    return variance / signal


@pytest.mark.parametrize(
    "placed",
    [
        {"workers": 2},
        {"workers": 3},
        {"workers": 4, "balance": (0, 3, 2, 1)},
        {"workers": 3, "exchange": "gloo"},
        {"workers": 2, "exchange": "gloo", "balance": (6, 0)},
        {"workers": 2, "balance": "random"},
    ],
    ids=str,
)
def test_the_noise_scale_has_the_same_bits_at_any_placement(
    train: Train, placed: dict[str, Any]
) -> None:
    recipe = small_recipe(global_batch=16, optimizer__max_grad_norm=1.0)
    alone, together = train(recipe, 1), train(recipe, **placed)
    scales = [
        [json.loads(line)["noise_scale"] for line in lines.read_text().splitlines()]
        for lines in (run.path / "metrics.jsonl" for run in (alone, together))
    ]
    assert scales[0] == scales[1]
    assert len({scale for scale in scales[0] if scale}) == 3  # steps 0, 25 and 50
