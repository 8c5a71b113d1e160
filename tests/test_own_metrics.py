"""Metrics of a loss function of one's own: exact means at any placement."""

import json
import runpy
from pathlib import Path
from typing import Any

import torch
from conftest import Own, Train
from own_samples import LOSS, METRICS

import samestep
from samestep import Run
from samestep.core.metric import Metric
from samestep.core.progress import MetricSums
from samestep.output.console import SilentView
from samestep.output.sentences import epoch_line
from samestep.output.tensorboard import step_scalars
from samestep.supervisor.forkserver_client import ForkServer


NAMES = ["right", "rare_right", "confidence"]


def scores(run: Run) -> list[dict[str, Any]]:
    """Return all means over samples, per epoch and of the test."""
    fields = [f"{s}_{n}" for s in ("train", "validation", "test") for n in NAMES]
    records = [*run.history, run.result]
    return [{name: r[name] for name in fields if name in r} for r in records]


def test_a_metric_of_ones_own_is_measured_under_its_name(
    train: Train, own: Own, server: ForkServer
) -> None:
    run = train(own(LOSS), 2)
    assert 0 <= run.result["test_confident"] <= 1
    assert "train_confident" in run.history[0]
    assert "test_accuracy" not in run.result
    found = samestep.evaluate(run, workers=3, server=server)
    assert found.means["confident"] == run.result["test_confident"]


def test_several_metrics_are_the_same_at_any_placement(
    train: Train, own: Own, server: ForkServer
) -> None:
    recipe = own(METRICS, epochs=2)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo"), (3, "shared")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert scores(run) == scores(alone)
    stopped = train(recipe.changed({"epochs": 1}), 2)
    quiet: dict[str, Any] = {"view": SilentView(), "server": server}
    resumed = samestep.resume(stopped, epochs=2, workers=3, **quiet)
    assert scores(resumed) == scores(alone)


def test_a_metric_is_the_sum_by_the_targets_or_by_its_own_count(
    train: Train, own: Own, server: ForkServer, tmp_path: Path
) -> None:
    run = train(own(METRICS), 2)
    (module,) = tmp_path.glob("mine_*.py")
    inputs, targets = runpy.run_path(str(module))["load"]()["test"]
    with torch.inference_mode():
        right = run.load_model()(inputs).argmax(1) == targets
    assert run.result["test_right"] == int(right.sum()) / len(targets)
    of_rare = right[targets == 2]
    assert run.result["test_rare_right"] == int(of_rare.sum()) / len(of_rare)
    found = samestep.evaluate(run, workers=3, server=server)
    assert found.own_metrics == NAMES
    assert found.means["rare_right"] == run.result["test_rare_right"]


def test_every_metric_is_shown(train: Train, own: Own) -> None:
    run = train(own(METRICS), 2, tensorboard=True)
    line = epoch_line(run.history[0], 1)
    assert all(
        f"{name} {run.history[0][f'train_{name}']:.4f}" in line for name in NAMES
    )
    assert run.result["own_metrics"] == NAMES
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    step = next(r for r in map(json.loads, lines) if r["type"] == "step")
    assert {f"train/{name}" for name in NAMES} <= step_scalars(step, 1).keys()
    page = run.report().read_text()
    for name in ("right", "rare right", "confidence"):
        assert f"Test {name}" in page


def test_a_count_of_zero_gives_no_number() -> None:
    sums = MetricSums()
    sums.add(MetricSums(loss=3.0, metrics=[1.0, 0.0, 6.0], targets=4))
    found = sums.means([Metric("rare", has_count=True), Metric("other")])
    assert found == {"loss": 0.75, "other": 1.5}
