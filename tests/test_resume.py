"""Going on after the end of all processes: the result of the uninterrupted training."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, small_recipe
from test_exactness import results
from test_launch import DEADLINE, LONG, all_gone, long_training, trains, wait_until

import samestep
from samestep import CheckpointError, Placement, Recipe, Run, RunError
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import fault_injection
from samestep.system.signals import stop_on_signals


CONSTANT = {"name": "constant"}
RECIPE = small_recipe(epochs=4, model__norm="batch")


def resume(path: Path, server: ForkServer, workers: int = 1, **options: Any) -> Run:
    return samestep.resume(
        path, workers=workers, view=SilentView(), server=server, **options
    )


def forget_after(run: Path, step: int) -> None:
    """Leave a run as if it had been killed after the checkpoint of this step."""
    (run / "result.json").unlink()
    (run / "model.safetensors").unlink()
    directory = checkpoint.directory_of(run)
    for later in checkpoint.steps(directory):
        if later > step:
            shutil.rmtree(checkpoint.path_of(directory, later))
    assert step in checkpoint.steps(directory)


@pytest.fixture
def stopped(train: Train, tmp_path: Path) -> Path:
    """Return a run of RECIPE as if killed after an earlier checkpoint."""
    run = train(RECIPE, 2, keep_checkpoints=4).path
    *_, earlier, last = checkpoint.steps(checkpoint.directory_of(run))
    assert last == 44
    forget_after(run, earlier)
    return run


def lines(run: Path) -> list[tuple[Any, ...]]:
    text = (run / "metrics.jsonl").read_text().splitlines()
    keys = ("type", "epoch", "step", "loss", "accuracy", "lr", "weights_sha256")
    return [tuple(json.loads(line).get(key) for key in keys) for line in text]


@pytest.mark.parametrize(
    ("workers", "exchange"), [(1, "shared"), (3, "gloo"), (6, "shared")]
)
def test_a_resumed_training_ends_like_the_uninterrupted_one(
    train: Train, stopped: Path, server: ForkServer, workers: int, exchange: str
) -> None:
    whole = train(RECIPE, 1)
    run = resume(stopped, server, workers, exchange=exchange)
    assert results(run) == results(whole)
    assert lines(run.path) == lines(whole.path)
    assert run.status == "finished"
    assert (run.path / "model.safetensors").read_bytes() == (
        whole.path / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)],
)
def test_a_signal_stops_with_a_checkpoint_in_the_middle_of_an_epoch(
    tmp_path: Path, server: ForkServer, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    with long_training(run, "--workers", "2", "--epochs", "3") as (process, below):
        process.send_signal(number)
        _, stderr = process.communicate(timeout=DEADLINE)
        assert process.returncode == code
        assert all_gone(below)
    assert f"go on with `samestep resume {run}`" in stderr
    assert Run.open(run).status == "interrupted"
    (step,) = checkpoint.steps(checkpoint.directory_of(run))
    assert step % 215
    assert f"stopped after step {step};" in stderr

    whole = samestep.train(
        Recipe.load("mnist-mlp", {"epochs": 3, "model.hidden": [16]}),
        Placement(workers=1, out=tmp_path / "whole"),
        view=SilentView(),
        server=server,
    )
    assert results(resume(run, server, 4)) == results(whole)


def is_read(master: int) -> bool:
    """Read a terminal, which would else stop its programs."""
    with contextlib.suppress(BlockingIOError):
        while os.read(master, 1 << 16):
            pass
    return True


def test_a_training_outlives_its_terminal_with_a_checkpoint(tmp_path: Path) -> None:
    run, (master, terminal) = tmp_path / "run", os.openpty()
    command = [sys.executable, "-m", "samestep", "train", "--out", str(run), *LONG]
    with subprocess.Popen(
        ["setsid", "--ctty", *command], stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        os.set_blocking(master, False)
        wait_until(
            lambda: is_read(master) and (trains(run) or process.poll() is not None)
        )
        os.close(master)
        assert process.wait(DEADLINE) == 129
    assert Run.open(run).status == "interrupted"
    assert checkpoint.steps(checkpoint.directory_of(run))


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    schedule = [
        {"number": 1, "kind": "loop", "point": "forward", "step": 220, "rank": 0}
    ]
    (tmp_path / "faults.json").write_text(json.dumps(schedule))
    os.environ[fault_injection.SCHEDULE] = str(tmp_path / "faults.json")
    run = tmp_path / "run"
    try:
        with long_training(run, "--workers", "2") as (process, below):
            wait_until(lambda: '"fault"' in (run / "events.jsonl").read_text())
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=DEADLINE)
            assert process.returncode in (130, 143)
            assert all_gone(below)
    finally:
        del os.environ[fault_injection.SCHEDULE]
    steps = checkpoint.steps(checkpoint.directory_of(run))
    assert f"`samestep resume {run}`, from step {steps[-1]}" in stderr


def test_workers_that_do_not_stop_are_killed_and_the_snapshot_is_kept(
    tmp_path: Path,
) -> None:
    schedule = [
        {"number": 1, "kind": "loop", "point": "forward", "step": 300, "rank": 0}
    ]
    (tmp_path / "faults.json").write_text(json.dumps(schedule))
    os.environ[fault_injection.SCHEDULE] = str(tmp_path / "faults.json")
    try:
        arguments = ("--workers", "2", "--checkpoint-seconds", "0.01")
        with long_training(tmp_path / "run", *arguments) as (process, _):
            directory = checkpoint.directory_of(tmp_path / "run")
            events = tmp_path / "run" / "events.jsonl"
            wait_until(lambda: events.exists() and '"fault"' in events.read_text())
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 143
    finally:
        del os.environ[fault_injection.SCHEDULE]
    assert 0 < checkpoint.steps(directory)[-1] <= 300


def test_killed_as_a_whole_it_goes_on_from_the_last_checkpoint(
    tmp_path: Path, server: ForkServer
) -> None:
    run = tmp_path / "run"
    directory = checkpoint.directory_of(run)
    arguments = ("--workers", "2", "--epochs", "3", "--checkpoint-seconds", "0.01")
    with long_training(run, *arguments) as (process, below):
        wait_until(lambda: len(checkpoint.steps(directory)) > 0)
        process.kill()
        process.wait(DEADLINE)
        wait_until(lambda: all_gone(below))
    resumed = resume(run, server, 3, exchange="gloo")
    recipe = Recipe.load("mnist-mlp", {"epochs": 3, "model.hidden": [16]})
    placement = Placement(workers=1, out=tmp_path / "whole")
    whole = samestep.train(recipe, placement, view=SilentView(), server=server)
    assert results(resumed) == results(whole)
    assert lines(resumed.path) == lines(whole.path)


def test_without_a_checkpoint_it_starts_again(
    train: Train, stopped: Path, server: ForkServer
) -> None:
    shutil.rmtree(checkpoint.directory_of(stopped))
    assert results(resume(stopped, server)) == results(train(RECIPE, 1))


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    train: Train,
    stopped: Path,
    server: ForkServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "samestep")
    directory = checkpoint.directory_of(stopped)
    *earlier, newest = checkpoint.steps(directory)
    file = checkpoint.path_of(directory, newest) / checkpoint.OPTIMIZER
    file.write_bytes(file.read_bytes()[:-5])
    run = samestep.resume(stopped, Placement(workers=1), server=server)
    assert results(run) == results(train(RECIPE, 1))
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert any(f"The checkpoint {file} cannot be used: it has" in w for w in warnings)
    after = f"going on after step {earlier[-1]}" if earlier else "from the beginning"
    assert after in caplog.text


def test_another_recipe_or_build_is_refused_with_what_differs(
    stopped: Path, server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (stopped / "recipe.toml").read_text()
    (stopped / "recipe.toml").write_text(text.replace("seed = 0", "seed = 5"))
    monkeypatch.setattr(
        server, "build", lambda _: {"torch": "9.9", "instruction_set": "SSE"}
    )
    with pytest.raises(CheckpointError) as caught:
        resume(stopped, server)
    message = str(caught.value)
    assert "recipe seed: 0 then, 5 now" in message
    assert "torch: 2." in message
    assert "9.9 now" in message
    assert "SSE now" in message
    assert "--allow-different-numerics" in message
    assert resume(stopped, server, allow_different_numerics=True).status == "finished"


def test_a_finished_run_is_extended_where_the_schedule_allows_it(
    train: Train, server: ForkServer
) -> None:
    short = train(small_recipe(epochs=2, schedule=CONSTANT), 2)
    with pytest.raises(RunError, match=r"is finished.*Use `--epochs N`"):
        resume(short.path, server)
    extended = resume(short.path, server, 3, epochs=4)
    long = train(small_recipe(epochs=4, schedule=CONSTANT), 1)
    assert results(extended) == results(long)
    assert extended.recipe == long.recipe
    with pytest.raises(RunError, match="has completed 4 epochs; 3 cannot be its end"):
        resume(short.path, server, epochs=3)


def test_a_finished_run_is_not_extended_where_the_past_would_differ(
    train: Train, server: ForkServer
) -> None:
    run = train(small_recipe(epochs=1), 1)
    with pytest.raises(RunError, match="its schedule `one-cycle` spans all 1 of them"):
        resume(run.path, server, epochs=2)
    assert Run.open(run.path).status == "finished"


def test_only_one_process_writes_a_run(tmp_path: Path) -> None:
    with long_training(tmp_path / "run", "--workers", "1"):
        ended = subprocess.run(
            [sys.executable, "-m", "samestep", "resume", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert ended.returncode == 2
        assert "another one is training" in ended.stderr
        assert trains(tmp_path / "run")


def test_what_is_not_a_run_cannot_be_resumed(
    tmp_path: Path, server: ForkServer
) -> None:
    with pytest.raises(RunError, match=r"it has no recipe\.toml"):
        resume(tmp_path, server)
