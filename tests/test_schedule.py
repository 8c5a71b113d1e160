from typing import Any

import pytest
import torch
from conftest import small_recipe
from torch.optim import lr_scheduler

from samestep import RecipeError
from samestep.config.schedule import (
    ConstantLR,
    CosineLR,
    CosineRestartsLR,
    LinearLR,
    OneCycleLR,
    PlateauLR,
    PolynomialLR,
    ScheduleRecipe,
    StepLR,
)
from samestep.core.lr_schedule import PORTABLE, learning_rate
from samestep.core.progress import Plateau


SCHEDULES: list[ScheduleRecipe] = [
    ConstantLR(),
    StepLR(every_epochs=3, factor=0.5),
    CosineLR(final=0.1),
    OneCycleLR(),
    LinearLR(final=0.1),
    PolynomialLR(power=1.5),
    CosineRestartsLR(every_steps=7, growth=2),
]


def rates(schedule: ScheduleRecipe, epochs: int = 5) -> list[float]:
    return [
        learning_rate(schedule, 2.0, step, 10, epochs * 10)
        for step in range(epochs * 10)
    ]


def test_constant_stays() -> None:
    assert set(rates(ConstantLR())) == {2.0}


def test_step_halves_after_every_third_epoch() -> None:
    found = rates(StepLR(every_epochs=3, factor=0.5), epochs=7)
    assert [found[epoch * 10] for epoch in range(7)] == [2, 2, 2, 1, 1, 1, 0.5]


def test_cosine_falls_to_its_final_share() -> None:
    found = rates(CosineLR(final=0.1))
    assert found == sorted(found, reverse=True)
    assert found[0] == 2.0
    assert found[-1] == pytest.approx(0.2, rel=0.02)


def test_one_cycle_rises_to_its_peak_and_falls_to_almost_nothing() -> None:
    found = rates(OneCycleLR(rise=0.3))
    assert found[0] == pytest.approx(0.08)
    assert max(found) == found[15] == pytest.approx(2.0)
    assert found[-1] == pytest.approx(0.0002)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_a_warm_up_rises_from_zero_and_then_changes_nothing(
    schedule: ScheduleRecipe,
) -> None:
    plain = rates(schedule)
    warm = rates(schedule.model_copy(update={"warmup_epochs": 0.5}))
    assert warm[:5] == pytest.approx(
        [rate * (step + 1) / 5 for step, rate in enumerate(plain[:5])]
    )
    assert warm[5:] == plain[5:]


def of_torch(make: Any, steps: int = 50) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


THEIRS: dict[str, tuple[ScheduleRecipe, Any]] = {
    "linear": (
        LinearLR(final=0.1),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=50),
    ),
    "polynomial": (
        PolynomialLR(power=3.0),
        lambda o: lr_scheduler.PolynomialLR(o, 50, power=3.0),
    ),
    "cosine": (CosineLR(), lambda o: lr_scheduler.CosineAnnealingLR(o, 50)),
    "restarts": (
        CosineRestartsLR(every_steps=7, final=0.25),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, eta_min=0.5),
    ),
    "growing": (
        CosineRestartsLR(every_epochs=1, growth=2),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10, T_mult=2),
    ),
    "step": (
        StepLR(every_steps=12, factor=0.5),
        lambda o: lr_scheduler.StepLR(o, 12, gamma=0.5),
    ),
}


@pytest.mark.parametrize("name", THEIRS)
def test_a_schedule_has_the_values_of_torch(name: str) -> None:
    schedule, make = THEIRS[name]
    assert rates(schedule) == pytest.approx(of_torch(make), abs=1e-12)
    portable = [learning_rate(schedule, 2.0, t, 10, 50, PORTABLE) for t in range(50)]
    assert portable == pytest.approx(rates(schedule), abs=1e-12)


@pytest.mark.parametrize("metric", ["validation_loss", "validation_accuracy"])
@pytest.mark.parametrize(
    ("patience", "cooldown", "min_delta"), [(0, 0, 0.0), (1, 2, 0.0), (2, 0, 0.05)]
)
def test_a_plateau_has_the_values_of_torch(
    metric: Any, patience: int, cooldown: int, min_delta: float
) -> None:
    sign = -1 if metric == "validation_accuracy" else 1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        mode="max" if sign < 0 else "min",
        factor=0.5,
        patience=patience,
        cooldown=cooldown,
        threshold=min_delta,
        threshold_mode="abs",
        min_lr=0.1,
    )
    schedule = PlateauLR(
        metric=metric,
        factor=0.5,
        patience=patience,
        cooldown=cooldown,
        min_delta=min_delta,
        final=0.1,
    )
    state = Plateau()
    draw = torch.Generator().manual_seed(0)
    for step in range(60):
        noise = torch.rand((), generator=draw).item()
        value = sign * (1 / (1 + 0.1 * step) + 0.2 * noise)
        theirs.step(value)
        state.observe(schedule, value)
        assert state.factor == optimizer.param_groups[0]["lr"]
        state = Plateau.model_validate_json(state.model_dump_json())
    assert state.factor == 0.1


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "step", "factor": 0.5}, "either `schedule.every_epochs` or"),
        (
            {"name": "cosine-restarts", "every_epochs": 1, "every_steps": 2},
            "`schedule.every_steps`; received 1 and 2",
        ),
        (
            {"name": "linear", "warmup_epochs": 1.0, "warmup_steps": 2},
            "received 1 and 2: leave out one",
        ),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(
    schedule: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        small_recipe(schedule=schedule)


def test_a_plateau_needs_an_optimizer_with_a_schedule_and_validation_samples() -> None:
    plateau, optimizer = {"name": "plateau"}, {"name": "schedule-free-adamw", "lr": 0.1}
    with pytest.raises(RecipeError, match="which evaluations must not decide"):
        small_recipe(schedule=plateau, optimizer=optimizer)
    with pytest.raises(RecipeError, match=r"`schedule\.metric` is for validation sam"):
        small_recipe(schedule=plateau, data__validation=0)


def test_a_power_that_is_not_whole_is_not_portable() -> None:
    schedule = {"name": "polynomial", "power": 1.5}
    with pytest.raises(RecipeError, match=r"`schedule\.power = 1\.5` .only for whole"):
        small_recipe(schedule=schedule, arithmetic="portable")
