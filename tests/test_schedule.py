import pytest

from samestep.config.optimizer import (
    ConstantLR,
    CosineLR,
    OneCycleLR,
    ScheduleRecipe,
    StepLR,
)
from samestep.core.lr_schedule import learning_rate


SCHEDULES: list[ScheduleRecipe] = [
    ConstantLR(),
    StepLR(every_epochs=3, factor=0.5),
    CosineLR(final=0.1),
    OneCycleLR(),
]


def rates(schedule: ScheduleRecipe, epochs: int = 5) -> list[float]:
    return [
        learning_rate(schedule, 2.0, step, 10, epochs) for step in range(epochs * 10)
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
