"""A loop that is stopped anywhere goes on with other workers as if nothing had been."""

import contextlib
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from test_loop import by_workers, data, network, threads
from torch.optim.optimizer import register_optimizer_step_pre_hook

import samestep
from samestep import OwnCodeError


assert threads  # the fixture for every test here
SCRIPT = """
import os
import contextlib
from collections.abc import Generator
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
import samestep

class Counted(IterableDataset):
    def __iter__(self):
        return ((torch.full((5,), float(i)) + torch.rand(5), i % 3) for i in range(32))

class Told(IterableDataset):
    at, start = 0, 0
    def __iter__(self):
        self.at, self.start = self.start, 0
        while self.at < 32:
            self.at += 1
            yield torch.full((5,), float(self.at)) + torch.rand(5), self.at % 3
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.start = state["at"]

x = torch.randn(46, 5, generator=torch.Generator().manual_seed(0))
samples = TensorDataset(x, x[:, :3].argmax(1))
torch.manual_seed(3)
layers = nn.Linear(5, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 3)
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
loop = samestep.Loop(model, micro_batches=4, balance="random")
saved = {"model": model, "optimizer": optimizer, "loop": loop}
file, done = Path("checkpoint.pt"), 0
if file.exists():
    states = torch.load(file)
    done = states.pop("done")
    for name, state in states.items():
        saved[name].load_state_dict(state)
for epoch in range(loop.epoch, 3):
    loader = DataLoader(DATA, 12)
    for step in loop.steps(loader, epoch=epoch):
        optimizer.param_groups[0]["lr"] = 0.01 + 0.01 * torch.rand(()).item()
        for inputs, targets in step:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            loop.add(loss=loss * len(targets), **{f"in{epoch}": len(targets)})
        optimizer.step()
        done += 1
        if done == STOP:
            states = {name: each.state_dict() for name, each in saved.items()}
            if loop.rank == 0:
                torch.save({"done": done, **states}, file)
            loop.fingerprint()  # until all have been there
            os._exit(0)
    loop.print(epoch, loop.mean(), loop.fingerprint())
"""


@pytest.mark.parametrize("data", ["samples", "Counted()", "Told()"])
def test_a_loop_goes_on_in_an_epoch_with_other_workers(
    tmp_path: Path, data: str
) -> None:
    """In the middle, at its end, and twice; metrics of the epoch are those of all.

    The workers own other micro-batches after each step.
    """
    script = SCRIPT.replace("DATA", data)
    script = script.replace("STOP", 'int(os.environ["GIVEN"])')
    steps = 4 if data == "samples" else 3
    stops = "2=2", f"1={steps}", f"3={2 * steps - 1}", "2=-1"
    lines = by_workers(script, tmp_path, "1=-1", *stops)
    assert len(lines) == 2 * 3
    assert lines[3:] == lines[:3]


def test_a_loop_goes_on_with_the_recipe_that_it_was_begun_with() -> None:
    state = samestep.Loop(network(), micro_batches=4).state_dict()
    with pytest.raises(OwnCodeError, match=r"the `micro_batches`.*with, 4; received 8"):
        samestep.Loop(network(), micro_batches=8).load_state_dict(state)


def test_the_state_after_an_epoch_begins_the_next() -> None:
    model = network()
    loop = samestep.Loop(model, micro_batches=2)
    for step in loop.steps(data(), 25, 0):
        for x, _ in step:
            loop.add(size=len(x))
            torch.autograd.backward(model(x).sum())
    state = loop.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    other = samestep.Loop(network(), micro_batches=2)
    other.load_state_dict(state)
    assert other.epoch == 1
    assert other.mean() == loop.mean() == {"size": 1.0}
    assert other.mean() == {}


def test_an_epoch_that_was_left_early_begins_with_its_first_step_again() -> None:
    model = network()
    loop = samestep.Loop(model, micro_batches=2)

    def first_step() -> list[torch.Tensor]:
        seen = []
        for x, _ in next(loop.steps(data(), 20, 0)):
            seen.append(x)
            torch.autograd.backward(model(x).sum())
        return seen

    assert torch.equal(torch.cat(first_step()), torch.cat(first_step()))


def test_a_loop_is_not_saved_between_the_micro_batches_of_a_step() -> None:
    """Nor before the first: its step would be left out."""
    model = network()
    loop = samestep.Loop(model, micro_batches=2)
    for step in loop.steps(data(), 25, 0):
        with pytest.raises(OwnCodeError, match="step 0 of epoch 0 is not over"):
            loop.state_dict()
        for x, _ in step:
            torch.autograd.backward(model(x).sum())
            with pytest.raises(OwnCodeError, match="Call `state_dict` after"):
                loop.state_dict()
        break
    state = loop.state_dict()
    assert (state["epoch"], state["step"]) == (0, 1)


def test_a_step_that_was_given_up_may_end_while_an_optimizer_makes_one() -> None:
    """Python collects it at any time, also while torch iterates over its hooks."""
    loop = samestep.Loop(network(), micro_batches=4)
    given_up = next(loop.steps(data(), 20, 0))
    assert isinstance(given_up, Generator)
    next(given_up)
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    with contextlib.ExitStack() as stack:
        for hook in (lambda *_: given_up.close(), lambda *_: None):
            stack.callback(register_optimizer_step_pre_hook(hook).remove)
        torch.optim.SGD([other], lr=1.0).step()
    assert other.item() == 0.0
