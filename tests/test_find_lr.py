"""The learning-rate range test: one suggestion at any number of workers."""

import csv
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import Own, fault, small_recipe

import samestep
from samestep import RunError, UsageError
from samestep.api.find_lr import check_new
from samestep.cli.main import cli
from samestep.core import lr_range
from samestep.core.lr_range import LrRange
from samestep.errors import WorkerFailed
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import fault_injection


RECIPES: dict[str, dict[str, Any]] = {
    "torch": {"epochs": 7, "early_stopping": {"patience": 1}},
    "portable": {"arithmetic": "portable", "optimizer": {"name": "sgd", "lr": 1.0}},
}
SHORT: dict[str, Any] = {"start": 1e-4, "end": 10.0, "steps": 25}
"""Longer than two epochs of 11 steps."""


@pytest.mark.parametrize("kind", RECIPES)
def test_the_losses_are_the_same_at_any_placement(
    server: ForkServer, kind: str
) -> None:
    recipe = small_recipe(**RECIPES[kind], schedule={"name": "cosine"})
    tests = [
        samestep.find_lr(recipe, workers=w, exchange=x, server=server, **SHORT)
        for w, x in ((1, "shared"), (2, "gloo"), (3, "shared"))
    ]
    assert tests[1] == tests[2] == tests[0]
    rates = tests[0].rates
    assert rates[0] == 1e-4
    assert len(rates) > lr_range.SKIPPED_FIRST
    ratios = [b / a for a, b in pairwise(rates)]
    assert ratios == pytest.approx([1e5 ** (1 / 24)] * len(ratios))
    assert tests[0].suggestion in rates


def test_own_code_has_a_suggestion_too(own: Own, server: ForkServer) -> None:
    code = "def optimizer(params, lr): return torch.optim.SGD(params, lr=lr)"
    tests = [
        samestep.find_lr(own(code), workers=w, server=server, **SHORT) for w in (1, 2)
    ]
    assert tests[0] == tests[1]
    assert tests[0].losses[-1] != tests[0].losses[0]


def test_a_test_ends_where_the_loss_is_not_finite(own: Own, server: ForkServer) -> None:
    code = "def loss(o, t): return functional.cross_entropy(o, t, reduction='sum') ** 9"
    found = samestep.find_lr(own(code), server=server, **SHORT | {"end": 1e30})
    assert len(found.losses) < 25
    assert all(map(math.isfinite, found.losses))


def test_a_failure_leaves_nothing(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = tmp_path / "faults.json"
    schedule.write_text(str([fault("kill", "forward", 3, rank=1)]).replace("'", '"'))
    monkeypatch.setenv(fault_injection.SCHEDULE, str(schedule))
    with pytest.raises(WorkerFailed):
        samestep.find_lr(small_recipe(), workers=2, server=server, **SHORT)
    assert list(tmp_path.iterdir()) == [schedule]


def test_the_command_writes_a_table_and_a_plot_and_no_run(
    own: Own, tmp_path: Path
) -> None:
    recipe = own("")
    name = recipe.to_dict()["model"]["build"].partition(":")[0]
    options = [f"--model={name}:build", f"--data={name}:load", "--find-lr"]
    done = subprocess.run(
        [sys.executable, "-m", "samestep", "train", *options],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    files = sorted(path.name for path in directory.iterdir())
    assert files == ["lr-range.csv", "lr-range.svg"]
    table = (directory / "lr-range.csv").read_text().splitlines()
    rows = list(csv.DictReader(table))
    losses = [float(row["loss"]) for row in rows]
    assert [float(row["smoothed"]) for row in rows] == lr_range.smoothed(losses)
    assert (directory / "lr-range.svg").read_text().startswith("<?xml")
    suggested = done.stdout.split("--set optimizer.lr=")[1].split()[0]
    index = lr_range.steepest(lr_range.smoothed(losses))
    assert index is not None
    assert suggested == f"{float(rows[index]['lr']):.3g}"


def test_what_a_range_test_cannot_do_is_refused(tmp_path: Path) -> None:
    for options in (["--callback=a:B"], ["--tracker=a:b"]):
        result = CliRunner().invoke(cli, ["train", "--find-lr", *options])
        assert isinstance(result.exception, UsageError)
    with pytest.raises(UsageError, match="at least 2 steps"):
        samestep.find_lr(small_recipe(), start=1.0, end=0.1)
    with pytest.raises(RunError, match="never overwrites"):
        check_new(tmp_path)


def test_the_suggestion_is_where_the_smoothed_loss_falls_fastest() -> None:
    rates = LrRange.between(1e-6, 1.0, 100)
    steps = np.arange(100)
    losses = 2.0 - 1 / (1 + np.exp(-(steps - 50) / 5)) + 0.001 * steps
    smooth = lr_range.smoothed(losses.tolist())
    index = lr_range.steepest(smooth)
    # The formulas of Lightning's `lr_find`.
    mean, expected = 0.0, []
    for number, loss in enumerate(losses.tolist(), 1):
        mean = 0.98 * mean + 0.02 * loss
        expected.append(mean / (1 - 0.98**number))
    assert smooth == pytest.approx(expected, rel=1e-12)
    assert index == np.gradient(np.array(expected)[10:-1]).argmin() + 10
    assert rates.rate(99) == pytest.approx(1.0)
    assert rates.rate(150) == rates.rate(99)


def test_a_loss_that_never_falls_has_no_suggestion() -> None:
    rising = [1.0 + 0.01 * step for step in range(50)]
    assert lr_range.steepest(lr_range.smoothed(rising)) is None
    assert lr_range.steepest(rising[:11]) is None
    assert lr_range.has_diverged([1.0, 2.0, 4.1])
    assert not lr_range.has_diverged([2.0, 1.0, 4.0])
