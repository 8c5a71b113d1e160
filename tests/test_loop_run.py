"""A loop with `out` leaves a run directory, the same at any number of workers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import DEADLINE, by_workers, data, network, threads
from test_report import Page
from test_schema import unnamed

import samestep
from samestep import OwnCodeError, Run, report
from samestep.api.audit import audit
from samestep.errors import RunError
from samestep.output.run import first_difference
from samestep.output.schema import Epoch, Result, Step


assert threads  # the fixture for every test here
SCRIPT = """
import json, os, signal
from pathlib import Path
import torch
from torch import nn
import samestep

KILLS, STOP, KEEP, OUT = {}, None, False, "run-" + os.environ["WORLD_SIZE"]
restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
x = torch.randn(46, 5, generator=torch.Generator().manual_seed(0))
samples = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
torch.manual_seed(3)
layers = nn.Linear(5, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 3)
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
loop = samestep.Loop(model, micro_batches=4, out=OUT)
parts = {"model": model, "optimizer": optimizer, "loop": loop}
if STOP and Path("checkpoint.pt").exists():
    STOP = None
    for name, state in torch.load("checkpoint.pt").items():
        parts[name].load_state_dict(state)
if KEEP:
    loop.keep(2, optimizer=optimizer)
for epoch in range(loop.epoch, 3):
    model.train()
    for step in loop.steps(samples, 12, epoch):
        if KILLS.get(restart) == (loop.rank, epoch, loop._position.step):
            os.kill(os.getpid(), signal.SIGKILL)
        for inputs, targets in step:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            loop.add(loss=loss * len(targets))
        optimizer.step()
        if (epoch, loop._position.step) == STOP:
            states = {name: part.state_dict() for name, part in parts.items()}
            if loop.rank == 0:
                torch.save(states, "checkpoint.pt")
            loop.fingerprint()  # until all have been there
            os._exit(0)
    loop.mean()
    model.eval()
    for inputs, targets in loop.share(samples, 12):
        loop.add(accuracy=(model(inputs).argmax(1) == targets).sum())
    loop.mean()
loop.print(loop.fingerprint())
loop.close()
"""


def records(run: Path) -> list[dict[str, Any]]:
    """Return what a run has recorded, apart from times."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    same = ("type", "epoch", "step", "loss", "accuracy", "weights_sha256")
    return [
        {name: record[name] for name in same if name in record}
        for record in map(json.loads, lines)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of workers."""
    directory = tmp_path_factory.mktemp("loop")
    printed = by_workers(SCRIPT, directory, 1, 2)
    found = {workers: directory / f"run-{workers}" for workers in (1, 2)}
    assert [Run.open(run).weights_sha256 for run in found.values()] == printed
    return found


def test_the_records_are_the_same_at_any_number_of_workers(
    runs: dict[int, Path],
) -> None:
    alone, two = (records(runs[workers]) for workers in (1, 2))
    assert alone == two
    kinds = [(r["type"], r["epoch"], r["step"], *list(r)[3:]) for r in alone]
    assert kinds == [
        record
        for epoch in (1, 2, 3)
        for record in (
            ("epoch", epoch, 4 * epoch, "weights_sha256"),
            ("step", epoch, 4 * epoch, "loss"),
            ("step", epoch, 4 * epoch, "accuracy"),
        )
    ]
    assert first_difference(*map(Run.open, runs.values())) is None


def test_a_run_of_a_loop_is_written_as_that_of_a_training(
    runs: dict[int, Path],
) -> None:
    run = Run.open(runs[2])
    assert not unnamed(dict(run.result), Result)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert not unnamed(record, Step if record["type"] == "step" else Epoch) - {"at"}
    result = Result.model_validate(run.result)
    assert (result.status, result.metrics) == ("finished", ["accuracy"])
    assert (result.recipe["global_batch"], result.placement["workers"]) == (12, 2)
    assert [epoch.epoch for epoch in result.epochs] == [1, 2, 3]
    for epoch in result.epochs:
        assert {
            "data",
            "compute",
            "exchange",
            "optimizer",
        } <= epoch.seconds_by_phase.keys()
        assert len(epoch.workers) == 2


def test_a_report_shows_what_a_loop_has_recorded(runs: dict[int, Path]) -> None:
    text = Page(report.write(runs[2])).text
    for shown in ("Accuracy", "Where the time went", "compute", "micro_batches"):
        assert shown in text
    assert "samestep train runs" not in text
    assert "How to repeat it" not in text


@pytest.mark.parametrize(
    "command", [samestep.resume, samestep.evaluate, audit, Run.load_model, Run.export]
)
def test_what_needs_a_recipe_refuses_the_run_of_a_loop(
    runs: dict[int, Path], command: Callable[[Any], Any]
) -> None:
    with pytest.raises(RunError, match=r"is of a `samestep\.Loop`.*Use the script"):
        command(Run.open(runs[1]))


def test_killed_workers_leave_the_records_of_an_undisturbed_loop(
    tmp_path: Path, runs: dict[int, Path]
) -> None:
    """Before the first snapshot, and after one that lacks the end of its epoch."""
    script = SCRIPT.replace("{}, None, False", "{0: (1, 0, 1), 1: (0, 1, 1)}, 0, True")
    (tmp_path / "script.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node=2", "--max-restarts=2", "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    run = Run.open(tmp_path / "run-2")
    assert records(run.path) == records(runs[1])
    assert run.result["restarts"] == 2
    assert first_difference(run, Run.open(runs[1])) is None
    assert "continues after step 4 with 2 workers" in Page(report.write(run.path)).text


def test_a_loop_that_was_stopped_goes_on_with_its_run(
    tmp_path: Path, runs: dict[int, Path]
) -> None:
    """Between two steps, and with fewer workers."""
    stops = SCRIPT.replace("{}, None", "{}, (1, 2)")
    script = stops.replace('"run-" + os.environ["WORLD_SIZE"]', '"run"')
    assert by_workers(script, tmp_path, 2, 1) == [Run.open(runs[1]).weights_sha256]
    assert records(tmp_path / "run") == records(runs[1])


def trained(loop: samestep.Loop, model: torch.nn.Module, size: int, epoch: int) -> None:
    for step in loop.steps(data(), size, epoch):
        for x, _ in step:
            torch.autograd.backward(model(x).sum())
            loop.add(loss=1.0)
    loop.mean()


def test_a_run_is_gone_on_with_or_refused_and_never_overwritten(
    tmp_path: Path,
) -> None:
    model, out = network(), tmp_path / "run"
    loop = samestep.Loop(model, micro_batches=2, out=out)
    trained(loop, model, 25, 0)
    state = loop.state_dict()
    assert "This training has not finished" in Page(report.write(out)).text
    loop.close()
    refused = {"out=": None, "global_batch 25 then, 20 now": state}
    for message, begun in refused.items():
        other = samestep.Loop(model, micro_batches=2, out=out)
        if begun:
            other.load_state_dict(begun)
        with pytest.raises(RunError, match=message):
            trained(other, model, 20, 1)
    other = samestep.Loop(model, micro_batches=2, out=out)
    other.load_state_dict(state)
    trained(other, model, 25, 1)
    other.close()
    assert [epoch["step"] for epoch in Run.open(out).history] == [2, 4]


@pytest.mark.parametrize("name", ["step", "workers", "top-1"])
def test_a_mean_that_a_record_has_no_room_for_is_refused(
    tmp_path: Path, name: str
) -> None:
    model = network()
    for out in (None, tmp_path / "run"):
        loop = samestep.Loop(model, micro_batches=2, out=out)
        step = next(loop.steps(data(), 25, 0))
        next(step)
        if out is None:
            loop.add(**{name: 1.0})
            continue
        with pytest.raises(OwnCodeError, match=f"received `{name}`"):
            loop.add(**{name: 1.0})
