"""Workers that torchrun starts, as on several machines, here over the loopback."""

import os
import shlex
import signal
import socket
from functools import partial

import pytest
from agents import Start, assert_same, hurry, recipe, start, wait_for
from conftest import Own, Train, small_recipe
from processes import is_running

import samestep
from samestep import resume
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.output.console import SilentView
from samestep.output.run import first_difference
from samestep.state import checkpoint


__all__ = ["recipe", "start"]  # the fixtures


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
