"""A machine with a worker whose gradients are wrong, under torchrun."""

import socket
from pathlib import Path

from conftest import Own, Train
from test_elastic import SLOW, Start, fingerprint_of, hurry, start, wait_for

from samestep import Run, resume
from samestep.output.console import SilentView
from samestep.output.run import first_difference


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


def test_a_wrong_bit_changes_nothing_and_a_worker_that_stays_wrong_ends_all_by_name(
    start: Start, own: Own, train: Train
) -> None:
    """A follower is wrong once, which costs the restart, then its leader always."""
    slow = SLOW.format(hurry=Path("hurry").absolute(), seconds=0.05)
    recipe = own(FLIPS + slow, epochs=40, arithmetic="torch")
    how = "--verify", "1", "--no-probe"
    faulty = {"FAULT": str(Path("fault").absolute())}
    a = start(recipe, "a", 1, *how, restarts=1)
    b = start(recipe, "b", 2, *how, restarts=1, variables=faulty)
    wait_for(lambda: a.events("epoch") and b.events("epoch"), a, b)
    inject("1 once")
    wait_for(lambda: len(a.events("generation")) == 2, a, b)
    done = len(a.events("epoch"))
    wait_for(lambda: len(a.events("epoch")) > done, a, b)
    inject("0 always")
    assert b.end() == 1, b.log
    assert a.end() == 75, a.log
    hurry()
    for machine in (a, b):
        firsts = [  # the ranks of b's leader in both generations
            1 if event["machines"][0]["workers"] == 1 else 0
            for event in machine.events("generation")
        ]
        wrong = Run.open(machine.out).result["wrong_workers"]
        assert [each["worker"] for each in wrong] == [firsts[0] + 1, firsts[1]]
        for each, event in zip(wrong, machine.events("wrong worker"), strict=True):
            assert event.items() > each.items()
        last = machine.log.splitlines()[-1]
        place = f"Worker {firsts[1]} on {HOST} was wrong in step {wrong[1]['step']}"
        assert f"{place}, and workers on {HOST} were 2 times: more often" in last
    run, undisturbed = resume(a.out, workers=2, view=SilentView()), train(recipe)
    assert first_difference(run, undisturbed) is None
    assert fingerprint_of(run) == fingerprint_of(undisturbed)
    assert len(run.result["wrong_workers"]) == 2
