"""Workers that torchrun starts, as on several machines, here over the loopback."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import Own, Train, small_recipe
from own_samples import EVERYTHING
from processes import is_running, reserved_port
from test_micro_batch_ledger import recorded

import samestep
from samestep import Run, resume
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.output import ledger
from samestep.output.console import SilentView
from samestep.output.run import first_difference
from samestep.state import checkpoint
from samestep.state.fingerprint import fingerprint
from samestep.supervisor.blame import WrongMicroBatch
from samestep.supervisor.forkserver_client import ForkServer
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
    """`start(recipe, out, workers, nodes=..., arguments)`: one machine."""
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


@pytest.mark.parametrize(("exchange", "workers"), [("auto", (1, 2)), ("gloo", (2, 1))])
def test_machines_give_the_weights_of_one(
    start: Start,
    train: Train,
    recipe: samestep.Recipe,
    exchange: str,
    workers: tuple[int, int],
) -> None:
    machines = [
        start(recipe, name, count, "--exchange", exchange)
        for name, count in zip("ab", workers, strict=True)
    ]
    for machine in machines:
        (generation,) = wait_for(partial(machine.events, "generation"), *machines)
        counts = [one["workers"] for one in generation["machines"]]
        assert sorted(counts) == sorted(workers)
        assert shlex.split(machine.log.splitlines()[0]) == machine.torchrun_command
    hurry()
    assert_same(train(recipe), *machines)


@pytest.mark.skipif(len(supported_isas()) < 2, reason="one instruction set only")
def test_machines_with_different_instruction_sets_train_together(
    start: Start, train: Train
) -> None:
    recipe = small_recipe(arithmetic="portable", model__norm="batch")
    isas = supported_isas()[:2]
    machines = [
        start(recipe, name, 1, variables={VARIABLE: isa})
        for name, isa in zip("ab", isas, strict=True)
    ]
    assert_same(train(recipe), *machines)
    assert (
        len({machine.events("training")[0]["instruction_set"] for machine in machines})
        == 2
    )


def test_a_killed_worker_costs_time_and_no_bit(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    a, b = (start(recipe, *place, restarts=3) for place in (("a", 1), ("b", 2)))
    wait_for(lambda: a.events("checkpoint") and b.events("epoch"), a, b)
    os.kill(b.workers()[1], signal.SIGKILL)
    wait_for(lambda: len(b.events("generation")) == 2, a, b)
    hurry()
    assert_same(train(recipe), a, b)
    second = b.events("generation")[1]
    assert second["number"] == 2
    assert second["step"] > 0


def test_machines_join_and_leave(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    """The second comes later, is lost with everything that runs on it, comes back."""
    a = start(recipe, "a", 1, nodes="1:2", restarts=3)
    wait_for(lambda: a.events("epoch"), a)
    b = start(recipe, "b", 1, nodes="1:2", restarts=3)
    wait_for(lambda: b.events("epoch"), a, b)
    (joined,) = b.events("generation")
    assert joined["receivers"] == [joined["node"]]
    assert joined["step"] > 0
    b.kill()
    wait_for(lambda: len(a.events("generation")) == 3, a)
    b = start(recipe, "b", 1, nodes="1:2", restarts=3)
    wait_for(lambda: len(b.events("generation")) == 2, a, b)
    hurry()
    assert_same(train(recipe), a, b)
    counts = [len(one["machines"]) for one in a.events("generation")]
    assert counts == [1, 2, 1, 2]


def test_machines_that_differ_are_listed_by_host(
    start: Start, recipe: samestep.Recipe
) -> None:
    cbwr = {"MKL_CBWR": "COMPATIBLE"}
    a, b = start(recipe, "a", 1), start(recipe, "b", 1, variables=cbwr)
    assert (a.end(), b.end()) == (2, 2), a.log + b.log
    host = socket.gethostname()
    for machine in (a, b):
        assert "All machines must agree on everything" in machine.log
        assert f"MKL_CBWR=COMPATIBLE on {host}" in machine.log


def test_another_recipe_does_not_join_and_disturbs_nobody(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    a = start(recipe, "a", 1, nodes="1:2")
    wait_for(lambda: a.events("epoch"), a)
    b = start(recipe.changed({"seed": 7}), "b", 1, nodes="1:2")
    assert b.end() == 2, b.log
    assert "differs in seed: 0 there and 7 here" in " ".join(b.log.split())
    assert "Traceback" not in b.log
    hurry()
    assert_same(train(recipe), a)
    assert len(a.events("generation")) == 1


COUNTS = """
class Net(nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + (self.calls > 9))

def build(inputs, outputs):
    return Net(*inputs, outputs)
"""


def test_hidden_state_ends_a_training_also_under_torchrun(
    start: Start, own: Own
) -> None:
    machine = start(own(COUNTS, epochs=2), "a", 1, nodes="1")
    assert machine.end() != 0
    assert "The same micro-batch gave another result in another process" in " ".join(
        machine.log.split()
    )


LOADS_LATE = """
import os, time

def load():
    if os.environ["RANK"] == "1" and os.environ["WORLD_SIZE"] == "2":
        time.sleep(4)
    return some()
"""


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_loading_may_take_longer_than_the_hang_timeout(
    start: Start, train: Train, own: Own, exchange: str
) -> None:
    recipe = own(LOADS_LATE)
    how = ("--hang-timeout", "2", "--exchange", exchange)
    a, b = (start(recipe, name, 1, *how) for name in "ab")
    assert_same(train(recipe), a, b)


def test_a_stop_leaves_a_checkpoint_from_which_one_machine_goes_on(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    a, b = (start(recipe, name, 1) for name in "ab")
    wait_for(lambda: a.events("epoch") and b.events("epoch"), a, b)
    b.process.send_signal(signal.SIGTERM)
    assert b.end() == 143, b.log
    # Perhaps it waits for b to come back, or is just ending by itself.
    a.process.send_signal(signal.SIGTERM)
    assert a.end() in (75, 143, -signal.SIGTERM), a.log
    steps = [checkpoint.steps(checkpoint.directory_of(m.out))[-1] for m in (a, b)]
    assert steps[0] == steps[1]
    hurry()
    run = resume(b.out, workers=2, view=SilentView())
    assert first_difference(run, train(recipe)) is None


def test_workers_whose_torchrun_is_killed_save_their_last_step(
    start: Start, recipe: samestep.Recipe
) -> None:
    a = start(recipe, "a", 1, "--checkpoint-seconds", "600", nodes="1")
    wait_for(lambda: a.events("epoch"), a)
    (worker,) = a.workers()
    a.agent.kill()
    wait_for(lambda: not is_running(worker))
    assert a.events("interrupted"), a.log
    assert checkpoint.steps(checkpoint.directory_of(a.out))[-1] >= 3


def test_a_fixed_balance_changes_no_bit_under_torchrun(
    start: Start, train: Train
) -> None:
    """The leader gets its job without a socket, and must own what the others think."""
    recipe = small_recipe()
    machines = [start(recipe, name, 1, "--balance", "5,1") for name in "ab"]
    assert_same(train(recipe), *machines)


HASHES = ("--ledger", "micro-batches")


def assert_same_hashes(reference: Run, *machines: Machine) -> None:
    """Assert the same of the ledgers of micro-batches, whoever computed them."""
    assert_same(reference, *machines)
    found = [recorded(Run.open(machine.out)) for machine in machines]
    for each in found:
        assert (each == found[0]).all()
        assert (each[..., 0] == recorded(reference)[..., 0]).all()
    ends = {Run.open(m.out).result["micro_batch_ledger_sha256"] for m in machines}
    assert len(ends) == 1


@pytest.mark.parametrize(("exchange", "workers"), [("auto", (1, 2)), ("gloo", (2, 1))])
def test_machines_record_the_micro_batches_of_one(
    start: Start,
    train: Train,
    server: ForkServer,
    exchange: str,
    workers: tuple[int, int],
) -> None:
    recipe = small_recipe(arithmetic="portable", model__norm="batch")
    how = (*HASHES, "--exchange", exchange, "--balance", "random", "--verify", "0.5")
    a, b = (
        start(recipe, name, count, *how)
        for name, count in zip("ab", workers, strict=True)
    )
    assert_same_hashes(train(recipe, ledger="micro-batches"), a, b)
    assert set(recorded(Run.open(a.out))[..., 1].ravel().tolist()) == {0, 1, 2}
    audited = samestep.audit(b.out, workers=1, full=True, server=server)
    assert audited.mismatch is None


def test_a_machine_that_joins_has_the_ledger_from_the_first_step_on(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    """Also one that was lost and comes back, and one that takes its place."""
    a = start(recipe, "a", 1, *HASHES, nodes="1:3", restarts=3)
    wait_for(lambda: a.events("epoch"), a)
    b = start(recipe, "b", 1, *HASHES, nodes="1:3", restarts=3)
    wait_for(lambda: b.events("epoch"), a, b)
    b.kill()
    wait_for(lambda: len(a.events("generation")) == 3, a)
    c = start(recipe, "c", 1, *HASHES, nodes="1:3", restarts=3)
    wait_for(lambda: c.events("epoch"), a, c)
    b = start(recipe, "b", 1, *HASHES, nodes="1:3", restarts=3)
    wait_for(lambda: len(b.events("generation")) == 2, a, b, c)
    hurry()
    assert_same_hashes(train(recipe, ledger="micro-batches"), a, b, c)


def stop(*machines: Machine) -> None:
    """Stop them as a scheduler does; all have a checkpoint of the same step."""
    wait_for(lambda: all(machine.events("epoch") for machine in machines), *machines)
    for machine in machines:
        machine.process.send_signal(signal.SIGTERM)
    for machine in machines:
        assert machine.end() in (75, 143, -signal.SIGTERM), machine.log


def test_a_machine_without_its_ledger_gets_that_of_another(
    start: Start, train: Train, recipe: samestep.Recipe
) -> None:
    """Also if it has the newest state; and the option need not be given again."""
    a, b = (start(recipe, name, 1, *HASHES) for name in "ab")
    stop(a, b)
    (b.out / ledger.MICRO_BATCHES).unlink()
    a, b = (start(recipe, name, 1, is_resumed=True) for name in "ab")
    again = wait_for(lambda: len(b.events("generation")) == 2 and b, a, b)
    last = again.events("generation")[-1]
    assert last["receivers"] == [last["node"]]
    hurry()
    assert_same_hashes(train(recipe, ledger="micro-batches"), a, b)


def test_machines_cannot_begin_to_record_micro_batches_later(
    start: Start, recipe: samestep.Recipe
) -> None:
    a = start(recipe, "a", 1, nodes="1")
    stop(a)
    a = start(recipe, "a", 1, *HASHES, nodes="1")
    assert a.end() == 2, a.log
    assert "A ledger of micro-batches begins with the first step" in a.log
    assert not (a.out / ledger.MICRO_BATCHES).exists()


def test_machines_with_other_options_for_all_workers_are_refused(
    start: Start, recipe: samestep.Recipe
) -> None:
    a = start(recipe, "a", 1, *HASHES, "--verify", "0.5")
    b = start(recipe, "b", 1, "--balance", "5,1")
    assert (a.end(), b.end()) == (2, 2), a.log + b.log
    host = socket.gethostname()
    for machine in (a, b):
        said = " ".join(machine.log.split())
        assert "All machines must agree on everything" in said
        for option, values in {
            "--ledger": ("micro-batches", "steps"),
            "--verify": ("0.5", "0.0"),
            "--balance": ("auto", "(5, 1)"),
        }.items():
            one, other = (f"{value} on {host}" for value in values)
            assert f"{option}: {one} and {other}" in said or (
                f"{option}: {other} and {one}" in said
            )


FORGETS = """
import os, pathlib
calls = 0

def loss(outputs, targets):
    global calls
    calls += outputs.requires_grad
    forgets = calls == 11 and os.environ.get("RANK") == "2"
    forgets = forgets and pathlib.Path("forget").exists()
    each = functional.cross_entropy(outputs, targets, reduction="none")
    return each * (not forgets)
"""


def test_an_audit_names_the_worker_of_several_machines_that_was_wrong(
    start: Start, own: Own, server: ForkServer
) -> None:
    recipe = own(FORGETS, epochs=4)
    file = Path("forget")
    file.touch()
    how = (*HASHES, "--no-probe", "--balance", "off")
    machines = [start(recipe, name, n, *how) for name, n in (("a", 1), ("b", 2))]
    for machine in machines:
        assert machine.end() == 0, machine.log
    file.unlink()
    for machine in machines:
        found = recorded(Run.open(machine.out))
        ((step, number),) = [
            (s, n) for s, n in np.ndindex(found.shape[:2]) if found[s, n, 0] == 0
        ]
        assert found[step, number, 1] == 2
        audited = samestep.audit(machine.out, workers=2, full=True, server=server)
        wrong = [WrongMicroBatch(number, 2)]
        assert (audited.step, audited.micro_batches) == (step + 1, wrong)
