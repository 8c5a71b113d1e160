"""Trainings that are measured in steps: they end, are evaluated and saved by steps."""

import json
from typing import Any

import pytest
from conftest import Train, fault, small_recipe
from test_exactness import results
from test_resume import forget_after, resume

import samestep
from samestep import RecipeError, Run, RunError
from samestep.report.learning_plots import learning_plot
from samestep.report.load import read_run
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


STEPS = 11
"""Of an epoch of the small recipe."""


def final(run: Run) -> tuple[dict[str, Any], bytes]:
    return results(run), (run.path / "model.safetensors").read_bytes()


def test_a_training_ends_in_the_middle_of_an_epoch_however_it_is_placed(
    train: Train, train_under: Train, server: ForkServer
) -> None:
    recipe = small_recipe(max_steps=STEPS + 6, model__norm="batch")
    assert recipe.epochs is None
    alone = train(recipe, 1)
    assert [epoch["step"] for epoch in alone.history] == [STEPS, STEPS + 6]
    whole = final(alone)
    kills = [fault("kill", "update", 13, rank=1)]
    assert final(train_under(recipe, kills, 3, exchange="shared")) == whole

    broken = train(recipe, 2, exchange="gloo", keep_checkpoints=2)
    first, *_ = checkpoint.steps(checkpoint.directory_of(broken.path))
    assert first < STEPS + 6
    forget_after(broken.path, first)
    assert final(resume(broken.path, server, 3, exchange="gloo")) == whole
    with pytest.raises(RunError, match="all 17 steps of its `max_steps`"):
        resume(broken.path, server)
    with pytest.raises(RunError, match="17, and not after `epochs`"):
        resume(broken.path, server, epochs=9)


@pytest.mark.parametrize("last", [STEPS + 6, STEPS])
def test_a_run_is_given_more_steps_and_is_what_it_would_have_been(
    train: Train, server: ForkServer, last: int
) -> None:
    """Its former end closed an epoch early, and an evaluation decided a rate there."""
    plateau = {"name": "plateau", "patience": 0, "factor": 0.5, "min_delta": 9.0}
    recipe = small_recipe(max_steps=last, schedule=plateau)
    run = train(recipe, 2, keep_checkpoints=2)
    longer = resume(run.path, server, 3, max_steps=2 * STEPS + 3, keep_checkpoints=2)
    assert longer.recipe.max_steps == 2 * STEPS + 3
    assert final(longer) == final(train(recipe.changed({"max_steps": 2 * STEPS + 3})))
    assert samestep.audit(longer, server=server, full=True).mismatch is None
    with pytest.raises(RunError, match=r"completed .* steps; 5 cannot be its end"):
        resume(run.path, server, max_steps=5)


def test_a_schedule_over_all_steps_fixes_their_number(
    train: Train, server: ForkServer
) -> None:
    by_epochs, by_steps = train(small_recipe()), train(small_recipe(max_steps=3))
    with pytest.raises(RunError, match="`one-cycle` spans all 3 of them"):
        resume(by_steps.path, server, max_steps=4)
    with pytest.raises(RunError, match="ends after `epochs`, 1, and not after `max_st"):
        resume(by_epochs.path, server, max_steps=4)


def test_so_many_steps_are_so_many_epochs(train: Train) -> None:
    by_epochs = train(small_recipe(epochs=2))
    by_steps = train(small_recipe(max_steps=2 * STEPS))
    assert by_steps.weights_sha256 == by_epochs.weights_sha256
    shas = [[e["weights_sha256"] for e in run.history] for run in (by_steps, by_epochs)]
    assert shas[0] == shas[1]


def test_a_training_has_one_length() -> None:
    recipe = small_recipe().changed({"max_steps": 5})
    assert (recipe.epochs, recipe.max_steps) == (None, 5)
    assert recipe.changed({"epochs": 3}).max_steps is None
    with pytest.raises(RecipeError, match="received 2 and 5: leave out one of them"):
        recipe.changed({"epochs": 2, "max_steps": 5})


def losses(run: Run) -> dict[int, float]:
    return {e["step"]: e["validation_loss"] for e in run.result["evaluations"]}


def test_evaluations_change_no_weight_and_are_the_same_however_it_is_placed(
    train: Train, train_under: Train, server: ForkServer
) -> None:
    plain = small_recipe(max_steps=2 * STEPS + 3, model__norm="batch", ema__decay=0.9)
    recipe = plain.changed({"evaluation_steps": 4})
    alone = train(recipe, 1)
    whole = final(alone)
    assert [*losses(alone)] == [4, 8, 12, 16, 20, 24, 25]
    ends = [epoch.get("validation_loss") for epoch in alone.history]
    assert ends == [None, None, losses(alone)[25]]

    (alone.path / "result.json").unlink()
    shown = read_run(alone.path)
    result = shown.result
    assert {e.step: e.validation_loss for e in result.evaluations} == losses(alone)
    plot = learning_plot("loss", shown.steps, result.epochs, result.evaluations)
    assert plot is not None
    assert "validation loss ends at" in plot.alt

    by_epoch = train(plain, 2)
    assert by_epoch.weights_sha256 == alone.weights_sha256
    assert [e["weights_sha256"] for e in by_epoch.history] == [
        e["weights_sha256"] for e in alone.history
    ]
    kills = [fault("kill", "update", 9, rank=1), fault("kill", "forward", 21, 0, 2)]
    killed = train_under(recipe, kills, 3, exchange="shared")
    assert (final(killed), losses(killed)) == (whole, losses(alone))

    broken = train(recipe, 2, exchange="gloo", keep_checkpoints=2)
    forget_after(broken.path, checkpoint.steps(checkpoint.directory_of(broken.path))[0])
    resumed = resume(broken.path, server, 3, exchange="gloo")
    assert (final(resumed), losses(resumed)) == (whole, losses(alone))


def test_an_early_end_between_epochs_is_the_same_however_it_is_placed(
    train: Train, train_under: Train
) -> None:
    recipe = small_recipe(
        max_steps=9 * STEPS,
        evaluation_steps=4,
        early_stopping={"patience": 2, "min_delta": 0.05},
        optimizer__lr=0.03,
        model__norm="batch",
    )
    alone = train(recipe, 1)
    steps, best = [*losses(alone)], alone.result["best_step"]
    assert steps[-1] == best + 2 * 4 < 9 * STEPS
    assert steps[-1] % STEPS
    assert alone.history[-1]["step"] == steps[-1]
    (at_best,) = (e for e in alone.result["evaluations"] if e["step"] == best)
    assert at_best["weights_sha256"] == alone.weights_sha256
    assert at_best["epoch"] == alone.result["best_epoch"]
    assert final(train(recipe, 2, exchange="gloo")) == final(alone)
    kill = fault("kill", "update", best, rank=2)
    assert final(train_under(recipe, [kill], 3, exchange="shared")) == final(alone)


def test_a_plateau_is_the_same_however_it_is_placed(
    train: Train, train_under: Train, server: ForkServer
) -> None:
    recipe = small_recipe(
        max_steps=30,
        evaluation_steps=4,
        schedule={"name": "plateau", "patience": 0, "min_delta": 0.2, "factor": 0.5},
    )
    alone = train(recipe, 1)
    rates = [step.lr or 0.0 for step in read_run(alone.path).steps]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) > 2
    kill = fault("kill", "update", 17, rank=2)
    assert final(train_under(recipe, [kill], 3, exchange="shared")) == final(alone)
    broken = train(recipe, 2, exchange="gloo", keep_checkpoints=2)
    forget_after(broken.path, checkpoint.steps(checkpoint.directory_of(broken.path))[0])
    assert final(resume(broken.path, server, 1)) == final(alone)


def test_checkpoints_come_after_so_many_steps(train: Train) -> None:
    """At these steps only, though a newer one may replace one that waits."""
    often = {"checkpoint_steps": 4, "checkpoint_seconds": 1e9, "snapshot_seconds": 0}
    run = train(small_recipe(max_steps=15), 2, **often)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    written = [
        event["step"]
        for event in map(json.loads, lines)
        if event["event"] == "checkpoint"
    ]
    assert len(written) >= 2
    assert written[-1] == 15
    assert set(written) <= {4, 8, 12, 15}
    assert run.weights_sha256 == train(small_recipe(max_steps=15)).weights_sha256


def test_the_best_checkpoint_is_that_of_an_evaluation(train: Train) -> None:
    recipe = small_recipe(max_steps=30, evaluation_steps=5, optimizer__lr=0.1)
    run = train(recipe, 2, snapshot_seconds=1e-6)
    best = min(losses(run).items(), key=lambda item: item[1])[0]
    assert best in checkpoint.steps(checkpoint.directory_of(run.path))


def test_evaluations_need_validation_samples() -> None:
    with pytest.raises(RecipeError, match="`evaluation_steps` is for validation sam"):
        small_recipe(evaluation_steps=5, data__validation=0)
