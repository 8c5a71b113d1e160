"""Failures while training: a kill costs seconds and changes no bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Own, Train, fault, small_recipe
from test_exactness import results

from samestep import Run, WorkerFailed
from samestep.errors import NonFiniteLoss, SamestepError, WorkerLate
from samestep.supervisor.recovery import RestartBudget, next_workers


RECIPE = small_recipe(epochs=3, model__norm="batch", optimizer__max_grad_norm=1.0)
"""30 steps, with everything that a snapshot must hold."""
PATIENCE = 8.0
"""Seconds; on a busy machine a worker may need some of them for its first step."""


def events(run: Run, *names: str) -> list[dict[str, Any]]:
    lines = (run.path / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in names]


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
@pytest.mark.parametrize("point", ["forward", "exchange", "update", "snapshot"])
def test_a_killed_worker_changes_no_bit(
    train: Train, train_under: Train, point: str, exchange: str
) -> None:
    schedule = [fault("kill", point, 13, rank=1), fault("kill", point, 22, 0, number=2)]
    run = train_under(RECIPE, schedule, 3, exchange=exchange)
    assert results(run) == results(train(RECIPE, 1))
    assert run.result["restarts"] == 2
    recorded = events(run, "fault", "failed", "restart", "training")
    names = [event["event"] for event in recorded]
    recovery = ["fault", "failed", "restart", "training"]
    assert names == ["training", *recovery, *recovery]
    assert "killed by SIGKILL" in recorded[2]["error"]
    assert [recorded[1]["rank"], recorded[5]["rank"]] == [1, 0]


def test_metrics_are_logged_once_however_often_steps_are_taken(
    train: Train, train_under: Train
) -> None:
    def lines(run: Run) -> list[tuple[Any, ...]]:
        text = (run.path / "metrics.jsonl").read_text().splitlines()
        keys = ("type", "epoch", "step", "loss", "accuracy", "lr", "weights_sha256")
        return [tuple(json.loads(line).get(key) for key in keys) for line in text]

    schedule = [fault("kill", "update", step, 1, number=step) for step in (4, 11, 19)]
    assert lines(train_under(RECIPE, schedule, 2)) == lines(train(RECIPE, 2))


def test_a_kill_in_a_restart_and_before_the_first_snapshot(
    train: Train, train_under: Train
) -> None:
    schedule = [
        fault("kill", "forward", 0, rank=0),
        fault("kill", "exchange", 17, rank=1, number=2),
        fault("kill", "start", 5, rank=1, number=3),
        fault("kill", "start", 5, rank=1, number=4),
    ]
    run = train_under(RECIPE, schedule, 2)
    assert results(run) == results(train(RECIPE, 1))
    assert run.result["restarts"] == 4


def test_a_worker_that_is_stopped_is_replaced(train: Train, train_under: Train) -> None:
    stop = [fault("stop", "update", 9, rank=1)]
    run = train_under(RECIPE, stop, 2, hang_timeout=PATIENCE)
    assert results(run) == results(train(RECIPE, 1))
    (failed,) = events(run, "failed")
    assert "late: worker 1 (stopped by a signal)" in failed["error"]


SLOW_TO_LOAD = """
import time

def load():
    time.sleep(5)
    x, y = some()
    return {"train": (x[:70], y[:70])}
"""


def test_loading_may_take_longer_than_a_step(own: Own, train: Train) -> None:
    run = train(own(SLOW_TO_LOAD), 1, hang_timeout=4.0)
    slow, *_ = events(run, "slow start")
    assert slow["phase"] == "loading the data"
    assert not [e for e in events(run, "failed") if "loading" in e["error"]]


def test_a_start_that_takes_too_long_names_what_it_does_and_the_flag(
    own: Own, train: Train
) -> None:
    message = r"worker 0, 1 has been loading the data for longer\..*`--start-timeout`"
    with pytest.raises(WorkerLate, match=message) as caught:
        train(own(SLOW_TO_LOAD), 2, start_timeout=0.5, max_restarts=0)
    assert "in load" in caught.value.details["traceback"]


def test_a_worker_that_is_stopped_while_it_loads_is_noticed(
    own: Own, train: Train
) -> None:
    code = SLOW_TO_LOAD.replace("time.sleep(5)", "os.kill(os.getpid(), signal.SIGSTOP)")
    with pytest.raises(WorkerLate, match=r"late: worker 0 \(stopped by a signal\)"):
        train(own("import os, signal\n" + code), 1, hang_timeout=1.0, max_restarts=0)


def test_an_endless_loop_shows_where_it_is(train_under: Train) -> None:
    loop = [fault("loop", "forward", 9, rank=0)]
    with pytest.raises(WorkerLate, match="late: worker 0") as caught:
        train_under(RECIPE, loop, 2, max_restarts=0, hang_timeout=PATIENCE)
    stacks = caught.value.details["traceback"]
    assert "in _inject" in stacks
    assert "in train_step" in stacks
    assert stacks in Path(caught.value.details["log"]).read_text()


def test_a_passing_exception_is_survived(train: Train, train_under: Train) -> None:
    run = train_under(RECIPE, [fault("exception", "forward", 9, rank=1)], 2)
    assert results(run) == results(train(RECIPE, 1))
    (failed,) = events(run, "failed")
    assert "InjectedError: on purpose, at forward" in failed["error"]


def test_the_same_exception_at_the_same_step_twice_is_final(train_under: Train) -> None:
    twice = [fault("exception", "forward", 9, 1, number=number) for number in (1, 2)]
    with pytest.raises(WorkerFailed, match=r"at step 10 twice in a row, so") as caught:
        train_under(RECIPE, twice, 2)
    assert "InjectedError: on purpose" in caught.value.details["traceback"]


def test_restarts_without_progress_run_out(train_under: Train) -> None:
    kills = [fault("kill", "forward", 9, 0, number=number) for number in range(1, 6)]
    with pytest.raises(WorkerFailed, match="2 restarts made no progress"):
        train_under(RECIPE, kills, 2, max_restarts=2)


def test_progress_refills_the_budget(train: Train, train_under: Train) -> None:
    kills = [fault("kill", "forward", 2 * n, 0, number=n) for n in range(1, 9)]
    run = train_under(RECIPE, kills, 2, max_restarts=1)
    assert run.result["restarts"] == 8
    assert results(run) == results(train(RECIPE, 1))


def error_at(
    step: int, code: int | None = None, text: str = "Worker 1 failed: it"
) -> Any:
    error = WorkerFailed(text)
    error.details = {"rank": 1, "step": step, "code": code}
    return error


def test_a_budget_is_for_failures_without_progress() -> None:
    budget = RestartBudget(max_restarts=2)
    for step in (5, 5, 6, 6, 7):
        budget.spend(error_at(step, code=-9))
    budget.spend(error_at(7, code=-9))
    with pytest.raises(WorkerFailed, match="made no progress"):
        budget.spend(error_at(7, code=-9))


def test_a_segmentation_fault_at_the_same_step_twice_is_the_users() -> None:
    budget = RestartBudget(max_restarts=9)
    budget.spend(error_at(5, code=-11))
    with pytest.raises(
        WorkerFailed, match="failed in the same way at step 6 twice in a row"
    ):
        budget.spend(error_at(5, code=-11))


def test_errors_that_are_no_accident_are_final() -> None:
    error: SamestepError = NonFiniteLoss("nan")
    with pytest.raises(NonFiniteLoss):
        RestartBudget(max_restarts=9).spend(error)


@pytest.mark.parametrize(
    ("workers", "min_workers", "cores", "crowded", "failures", "expected"),
    [
        (4, 4, 2, False, 1, 4),
        (4, 2, 2, False, 1, 2),
        (4, 1, 3, False, 1, 3),
        (4, 1, 8, False, 1, 4),
        (4, 1, 2, True, 1, 4),
        (4, 1, 8, False, 2, 3),
        (1, 1, 8, False, 9, 1),
    ],
)
def test_fewer_workers_only_if_allowed_and_needed(
    workers: int,
    min_workers: int,
    cores: int,
    crowded: bool,
    failures: int,
    expected: int,
) -> None:
    assert next_workers(workers, min_workers, cores, crowded, failures) == expected


def test_after_restarts_without_progress_fewer_workers_go_on(
    train: Train, train_under: Train
) -> None:
    kills = [fault("kill", "forward", 9, 2, number=number) for number in range(1, 9)]
    run = train_under(RECIPE, kills, 3, max_restarts=5, min_workers=2)
    assert results(run) == results(train(RECIPE, 1))
    assert [event["workers"] for event in events(run, "restart")] == [3, 2]
