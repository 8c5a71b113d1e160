"""Machines of a test: agents of torchrun and their workers, over the loopback."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Own
from own_samples import EVERYTHING
from processes import reserved_port

import samestep
from samestep import Run
from samestep.output.run import first_difference
from samestep.state.fingerprint import fingerprint
from samestep.verification import replicas


SLOW = """
import pathlib, time

def loss(outputs, targets):
    if outputs.requires_grad and not pathlib.Path("{hurry}").exists():
        time.sleep({seconds})
    return functional.cross_entropy(outputs, targets, reduction="none")
"""
"""Machines come and go while it lasts; the file `hurry` ends that.

Few epochs of slow micro-batches: after that file they are quickly done.
"""
DEADLINE = 120.0


@pytest.fixture
def recipe(own: Own) -> samestep.Recipe:
    """Normalisation, dropout, frozen and tied parameters; 3 steps per epoch."""
    slow = SLOW.format(hurry=Path("hurry").absolute(), seconds=0.1)
    return own(EVERYTHING + slow, epochs=60, **{"optimizer.max_grad_norm": 1.0})


def hurry() -> None:
    Path("hurry").touch()


class Machine:
    """One agent of torchrun and its workers."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, log: Path) -> None:
        self.process, self.out, self._log = process, out, log

    def end(self) -> int:
        """Wait for the end, and return the exit code."""
        return self.process.wait(DEADLINE)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        file = self.out / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == name]

    def workers(self) -> list[int]:
        """Return the processes that the fork server of torchrun has forked."""
        return [child.pid for child in self.fork_server.children()]

    @property
    def fork_server(self) -> psutil.Process:
        (server,) = self.agent.children()
        return server

    @property
    def agent(self) -> psutil.Process:
        (torchrun,) = psutil.Process(self.process.pid).children()
        return torchrun

    @property
    def torchrun_command(self) -> list[str]:
        return self.agent.cmdline()

    def kill(self) -> None:
        """Kill everything at once, as when the machine loses its power."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            process.kill()
        self.process.kill()
        self.process.wait()


Start = Callable[..., Machine]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """`start(recipe, name, workers, *arguments, nodes=...)`: one machine."""
    with ExitStack() as stack:
        endpoint = f"127.0.0.1:{stack.enter_context(reserved_port())}"

        def run(
            recipe: samestep.Recipe,
            name: str,
            workers: int,
            *arguments: str,
            **fields: Any,
        ) -> Machine:
            file = tmp_path / f"{name}.toml"
            file.write_text(recipe.to_toml())
            out = tmp_path / name / f"run-{name}"  # each machine may have its own
            what = ["train", str(file), "--out", str(out)]
            if fields.get("is_resumed"):
                what = ["resume", str(out)]
            command = [
                *(sys.executable, "-m", "samestep", *what),
                *("--nodes", fields.get("nodes", "2"), "--rdzv-endpoint", endpoint),
                *("--interface", "127.0.0.1", "--workers", str(workers)),
                *("--max-restarts", str(fields.get("restarts", 0))),
                *("--no-report", "--no-tensorboard"),
                *("--snapshot-seconds", "0.01", *arguments),
            ]
            log = tmp_path / f"{name}.log"
            with log.open("wb") as output:
                variables = {**os.environ, **fields.get("variables", {})}
                process = subprocess.Popen(
                    command, stdout=output, stderr=output, env=variables
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return Machine(process, out, log)

        yield run


def wait_for(condition: Callable[[], Any], *machines: Machine) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := condition()):
        logs = "\n".join(machine.log for machine in machines)
        assert time.monotonic() < end, logs
        assert all(machine.process.poll() is None for machine in machines), logs
        time.sleep(0.05)
    return found


def assert_same(reference: Run, *machines: Machine) -> None:
    """Assert that each machine ended well, with all of the results."""
    for machine in machines:
        assert machine.end() == 0, machine.log
    for machine in machines:
        run = Run.open(machine.out)
        assert run.status == "finished"
        assert first_difference(run, reference) is None
        assert run.result["test_accuracy"] == reference.result["test_accuracy"]
        assert fingerprint_of(run) == fingerprint_of(reference)
        assert steps_in(run) == steps_in(reference)
        ledgers = [(each.path / "ledger").read_bytes() for each in (run, reference)]
        assert ledgers[0] == ledgers[1]
        assert not (machine.out / "state").exists()


def fingerprint_of(run: Run) -> str:
    return fingerprint(replicas.load(run.model_file))


def steps_in(run: Run) -> list[tuple[Any, ...]]:
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    keys = ("type", "epoch", "step", "loss", "accuracy", "weights_sha256")
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]
