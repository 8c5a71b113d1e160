"""What `Loop.steps` and `Loop.share` take as data, at any number of workers."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loop import by_workers, data, network, threads
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import samestep
from samestep import OwnCodeError
from samestep.user_code import seeding


assert threads  # the fixture for every test here


def train(steps: Any, model: nn.Module, most: int | None = None) -> list[Any]:
    """Take steps; return the inputs of each micro-batch of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Any] = []
    for step in steps:
        seen.append([])
        for x, y in step:
            torch.autograd.backward(nn.functional.cross_entropy(model(x), y))
            seen[-1].append(x.tolist())
        optimizer.step()
        if len(seen) == most:
            break
    return seen


def seen_in(data: Any, batch: int | None = None, most: int | None = None) -> list[Any]:
    model = network()
    loop = samestep.Loop(model, 4)
    return train(loop.steps(data, batch, 1), model, most)


def flat(steps: list[Any]) -> list[Any]:
    return [x for step in steps for micro_batch in step for x in micro_batch]


def test_a_shuffling_loader_is_its_data_set_in_the_order_of_the_seed() -> None:
    loader = DataLoader(data(), batch_size=16, shuffle=True)
    assert seen_in(loader) == seen_in(data(), 16)


def test_a_loader_that_does_not_shuffle_keeps_the_order() -> None:
    samples = data()
    loader = DataLoader(samples, batch_size=16)
    assert flat(seen_in(loader)) == samples.tensors[0].tolist()


def test_a_last_batch_may_be_dropped() -> None:
    loader = DataLoader(data(50), batch_size=16, drop_last=True)
    assert [sum(map(len, step)) for step in seen_in(loader)] == [16, 16, 16]


SAMPLERS = {
    "weights": WeightedRandomSampler([1.0, 3.0] * 25, 40),
    "weights, own generator": WeightedRandomSampler(
        [1.0, 3.0] * 25, 40, generator=torch.Generator()
    ),
    "a subset": SubsetRandomSampler(range(30)),
    "with replacement": RandomSampler(range(50), replacement=True, num_samples=33),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_draws_by_the_seed_and_the_epoch(kind: str) -> None:
    loader = DataLoader(data(), batch_size=16, sampler=SAMPLERS[kind])
    torch.manual_seed(1)
    first = seen_in(loader)
    torch.manual_seed(2)
    assert seen_in(loader) == first
    assert len(flat(first)) == len(list(SAMPLERS[kind]))
    model = network()
    assert train(samestep.Loop(model, 4).steps(loader, epoch=2), model) != first


def test_a_batch_sampler_decides_about_global_batches() -> None:
    batches = [[0, 1, 2, 3, 4, 5, 6], [8, 9], [10, 20, 30, 40]]
    samples = data()
    loader = DataLoader(samples, batch_sampler=batches)
    sizes = [sum(map(len, step)) for step in seen_in(loader)]
    assert sizes == [7, 2, 4]
    inputs = samples.tensors[0]
    assert flat(seen_in(loader)) == [inputs[i].tolist() for b in batches for i in b]


class Noisy(Dataset[Any]):
    """Draws from torch's generator when a sample is read."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.full((5,), float(index)) + torch.rand(5), index % 3


class Counted(IterableDataset[Any]):
    """A stream that draws as it goes, from torch's generator."""

    def __init__(self, length: int | None = 30) -> None:
        self.length = length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        index = 0
        while self.length is None or index < self.length:
            yield torch.full((5,), float(index)) + torch.rand(5), index % 3
            index += 1


class Dropping(nn.Module):
    """Draws from torch's generator, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.layer(nn.functional.dropout(x, 0.5)))


@pytest.mark.parametrize("samples", [Noisy(), Counted()], ids=["indexed", "stream"])
def test_loading_ahead_in_other_processes_changes_no_bit(samples: Any) -> None:
    """Neither what is drawn when a sample is read, nor what the model draws."""
    found = []
    for processes in (0, 1, 2):
        model = Dropping()
        loop = samestep.Loop(model, 4)
        loader = DataLoader(samples, batch_size=9, num_workers=processes)
        for epoch in range(2):
            seen = train(loop.steps(loader, epoch=epoch), model)
        found.append((loop.fingerprint(), seen))
    assert found[0] == found[1] == found[2]


def test_a_stream_is_cut_by_position_and_read_to_its_end() -> None:
    steps = seen_in(Counted(30), 8)
    assert [[len(m) for m in step] for step in steps] == [[2] * 4] * 3 + [[1, 2, 1, 2]]
    assert [int(x[0]) for x in flat(steps)] == list(range(30))


def test_a_stream_without_end_is_left_after_any_step() -> None:
    steps = seen_in(Counted(None), 8, most=5)
    assert [int(x[0]) for x in flat(steps)] == list(range(40))


def test_what_a_stream_draws_does_not_depend_on_the_global_batch() -> None:
    assert flat(seen_in(Counted(24), 8)) == flat(seen_in(Counted(24), 6))


def test_a_generator_that_is_used_up_is_not_an_epoch() -> None:
    once = iter([(torch.ones(5), 1)] * 8)
    model = network()
    loop = samestep.Loop(model, 4)
    assert len(train(loop.steps(once, 8, 0), model)) == 1
    with pytest.raises(OwnCodeError, match="make another for each epoch"):
        next(loop.steps(once, 8, 1))


class Epochs(Counted):
    """A stream that shuffles by its epoch, as those of Hugging Face do."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return ((torch.full((5,), float(self.epoch)), 0) for _ in range(8))


def test_a_stream_is_told_the_epoch() -> None:
    model = network()
    loop = samestep.Loop(model, 4)
    for epoch in range(3):
        seen = train(loop.steps(Epochs(), 8, epoch), model)
        assert {x[0] for x in flat(seen)} == {float(epoch)}


LOADERS = {
    "a subset": DataLoader(data(), batch_size=7, sampler=SubsetRandomSampler(range(9))),
    "shuffled": DataLoader(data(9), batch_size=7, shuffle=True),
    "a stream": DataLoader(Counted(9), batch_size=7),
    "processes": DataLoader(data(9), batch_size=7, num_workers=2),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_an_evaluation_takes_a_loader_and_sees_every_sample_once(kind: str) -> None:
    loop = samestep.Loop(network(), 4)
    for x, _ in loop.share(LOADERS[kind]):
        loop.add(size=(len(x), 1))
    assert loop.mean() == {"size": 4.5}


@pytest.mark.parametrize(
    ("given", "batch", "message"),
    [
        (data(), None, "say of how many samples"),
        (data(), 0, "Received 0"),
        ([], 4, "epoch 0 had none"),
        (DataLoader(data(), batch_size=4), 8, "leave out `global_batch`"),
        (DataLoader(data(), batch_size=None), None, "Give a number"),
        (
            DataLoader(data(), 4, sampler=DistributedSampler(data(), 2, 0)),
            None,
            "the DistributedSampler of this DataLoader would divide them again",
        ),
    ],
)
def test_data_that_cannot_be_cut_are_refused(
    given: Any, batch: int | None, message: str
) -> None:
    with pytest.raises(OwnCodeError, match=message):
        next(samestep.Loop(network(), 4).steps(given, batch, 0))


def test_the_epoch_must_be_given() -> None:
    with pytest.raises(OwnCodeError, match="pass its number"):
        next(samestep.Loop(network(), 4).steps(data(), 4))


SCRIPT = """
import os
import torch
from torch import nn
import samestep
from test_loop import data, network
from test_loop_data import Counted, Noisy
from torch.utils.data import DataLoader, WeightedRandomSampler

weights = WeightedRandomSampler([1.0, 3.0] * 15, 25)
loaders = [
    DataLoader(Noisy(), 8, sampler=weights, num_workers=1),
    DataLoader(Counted(30), 8, num_workers=1),
    DataLoader(Counted(30), 8, drop_last=True),
    DataLoader(Noisy(), batch_sampler=[[1, 2, 3, 4, 5, 6, 7], [8], [9, 1]]),
]
model = network()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
loop = samestep.Loop(model, micro_batches=5, balance="random")
for loader in loaders:
    for step in loop.steps(loader, epoch=1):
        for x, y in step:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            loop.add(loss=loss * len(y))
        optimizer.step()
    for x, y in loop.share(loader):
        loop.add(seen=(x.sum().item(), 1))
    for batch in loop.global_batches(loader):
        for x, y in loop.measure(batch):
            loop.add(measured=(x.sum().item(), 1))
    loop.print(loop.mean(), loop.fingerprint())
"""


def test_every_kind_of_data_gives_one_result_at_any_number_of_workers(
    tmp_path: Path,
) -> None:
    """With and without an end, with samplers, and with processes that load ahead.

    The workers own other micro-batches after each step.
    """
    here = str(Path(__file__).parent)
    script = f"import sys; sys.path.insert(0, {here!r})\n{SCRIPT}"
    lines = by_workers(script, tmp_path, 1, 2, 3, 5)
    assert lines == lines[:4] * 4


DIVIDED = """
import itertools, os
import torch
import samestep
from test_loop import network
from test_loop_data import Counted

class Divided(Counted):
    def __iter__(self):
        return itertools.islice(super().__iter__(), int(os.environ["RANK"]), None, 2)

next(samestep.Loop(network(), 4).steps(Divided(), 8, 0))
"""


def test_a_stream_that_divides_itself_among_the_ranks_is_refused(
    tmp_path: Path,
) -> None:
    script, here = tmp_path / "script.py", Path(__file__).parent
    script.write_text(f"import sys; sys.path.insert(0, {str(here)!r})\n{DIVIDED}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ended = subprocess.run(
        [*command, "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ended.returncode
    assert "these workers began with different ones" in ended.stderr


@pytest.mark.parametrize("draws", range(4))
def test_generators_go_on_after_a_step_from_where_they_were(draws: int) -> None:
    """Also numpy's, when it holds the second of two normal numbers."""
    model = network()
    steps = samestep.Loop(model, micro_batches=2).steps(data(), 10, epoch=0)

    def numbers(takes_a_step: bool) -> list[float]:
        seeding.seed(5)
        before = [np.random.randn() for _ in range(draws)]
        if takes_a_step:
            for x, _ in next(steps):
                torch.autograd.backward(model(x).sum())
                np.random.randn(7)
        more = [np.random.randn(), torch.rand(()).item(), random.random()]
        return [*before, *more, np.random.randn()]

    assert numbers(True) == numbers(True) == numbers(True) == numbers(False)
