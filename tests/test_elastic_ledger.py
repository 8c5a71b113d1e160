"""The ledger of micro-batches of workers that torchrun starts on several machines."""

import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from agents import Machine, Start, assert_same, hurry, recipe, start, wait_for
from conftest import Own, Train, small_recipe
from test_micro_batch_ledger import recorded

import samestep
from samestep import Run
from samestep.output import ledger
from samestep.supervisor.blame import WrongMicroBatch
from samestep.supervisor.forkserver_client import ForkServer


__all__ = ["recipe", "start"]  # the fixtures

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
