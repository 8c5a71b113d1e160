"""A machine with a worker whose gradients are wrong, under torchrun."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agents import SLOW, Machine, Start, assert_same, hurry, start, wait_for
from conftest import Own, Train

import samestep
from samestep import Run


__all__ = ["start"]  # the fixture

FLIPS = """
import os, pathlib

FAULT = pathlib.Path(os.environ.get("FAULT", "none"))

class Net(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if self.training and FAULT.exists():
            rank, how_often = FAULT.read_text().split()
            if os.environ["LOCAL_RANK"] == rank:
                if how_often == "once":
                    FAULT.unlink()
                y.detach().view(torch.int32)[0, 0] ^= 1 << 20
        return y

def build(inputs, outputs):
    return Net(*inputs, outputs)
"""
HOST = socket.gethostname()


def inject(fault: str) -> None:
    """Write a local rank and how often it is wrong, so that no worker reads a part."""
    Path("new").write_text(fault)
    Path("new").rename("fault")


VERIFIED = "--verify", "1", "--no-probe"


@pytest.fixture
def recipe(own: Own) -> samestep.Recipe:
    slow = SLOW.format(hurry=Path("hurry").absolute(), seconds=0.05)
    return own(FLIPS + slow, epochs=60, arithmetic="torch")


@pytest.fixture
def pair(start: Start, recipe: samestep.Recipe) -> Callable[..., list[Machine]]:
    """`pair(**fields)`: machines of one and two workers; faults are the second's."""

    def begin(**fields: Any) -> list[Machine]:
        faulty = {"FAULT": str(Path("fault").absolute())}
        a = start(recipe, "a", 1, *VERIFIED, **fields)
        if fields["nodes"] == "1:2":  # the first to arrive has the store, and stays
            wait_for(lambda: a.events("epoch"), a)
        b = start(recipe, "b", 2, *VERIFIED, variables=faulty, **fields)
        wait_for(lambda: a.events("epoch") and b.events("epoch"), a, b)
        return [a, b]

    return begin


def wrong_in(machine: Machine) -> list[dict[str, Any]]:
    """Return who was wrong; in its events, too."""
    wrong: list[dict[str, Any]] = Run.open(machine.out).result["wrong_workers"]
    for each, event in zip(wrong, machine.events("wrong worker"), strict=True):
        assert event.items() > each.items()
        assert each["host"] == HOST
    return wrong


def test_wrong_bits_change_nothing_and_a_machine_that_has_too_many_is_done_without(
    pair: Callable[..., list[Machine]], train: Train, recipe: samestep.Recipe
) -> None:
    """A follower is wrong once, which costs the restart, then its leader always."""
    a, b = pair(nodes="1:2", restarts=1)
    inject("1 once")
    wait_for(lambda: b.events("wrong worker"), a, b)
    done = len(b.events("epoch"))
    wait_for(lambda: len(b.events("epoch")) > done, a, b)
    inject("0 always")
    assert b.end() == 1, b.log
    wait_for(lambda: len(a.events("generation")[-1]["machines"]) == 1, a)
    hurry()
    assert_same(train(recipe), a)
    firsts = [  # the ranks of b's leader
        1 if event["machines"][0]["workers"] == 1 else 0
        for event in b.events("generation")
    ]
    for machine in (a, b):
        workers = [each["worker"] for each in wrong_in(machine)]
        assert workers == [firsts[0] + 1, firsts[1]]
    place = f"Worker {firsts[1]} on {HOST} was wrong in step {wrong_in(b)[1]['step']}"
    last = b.log.splitlines()[-1]
    assert f"{place}. Workers there were wrong 2 times, and no restart" in last


def test_where_all_machines_are_needed_a_worker_that_stays_wrong_ends_all_by_name(
    pair: Callable[..., list[Machine]],
) -> None:
    a, b = pair(nodes="2", restarts=0)
    inject("1 always")
    assert b.end() == 1, b.log
    assert a.end() == 75, a.log
    for machine in (a, b):
        (wrong,) = wrong_in(machine)
        named = f"Worker {wrong['worker']} on {HOST} was wrong in step {wrong['step']}"
        assert named in machine.log.splitlines()[-1]
