"""Micro-batches that a helper draws ahead of time: the same bits, the same errors."""

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Train
from data_samples import recipe_of
from test_exactness import results

from samestep import Recipe, Run
from samestep.core.plan import Plan, derive_seed
from samestep.data import prefetch
from samestep.data.augment import Mixed
from samestep.data.prefetch import MicroBatches, Prefetcher
from samestep.data.sources.user_dataset import Arrays, Indexed, is_in_memory
from samestep.data.splits import Converted, Part


SIZE = 100
DEADLINE = 60.0
CODE = """
import os, random, time
import numpy as np
import torch

class Noisy:
    def __init__(self, seconds, bad):
        self.seconds, self.bad = seconds, bad
        self.file = open(os.devnull)
        self.drawn = []

    def __len__(self):
        return 100

    def __getitem__(self, i):
        if i == self.bad:
            raise ValueError(f"sample {i} is rotten")
        time.sleep(self.seconds)
        noise = random.random() + np.random.rand() + torch.rand(6)
        return noise + i % 2, i % 2

    def __del__(self):
        self.file.close()

def load(seconds=0.0, bad=-1):
    return {"train": Noisy(seconds, bad), "test": Noisy(0.0, -1)}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 2)

    def forward(self, x):
        x = x + random.random() + np.random.rand()
        return self.layer(torch.nn.functional.dropout(x, 0.3, self.training))

def build():
    return Net()
"""


def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> Recipe:
    """Own data that draw from all generators, and a model that goes on with them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy.py").write_text(CODE)
    data = {"source": "custom", "load": "noisy:load", "arguments": arguments}
    model = {"family": "custom", "build": "noisy:build"}
    return recipe_of(data).changed({"model": model})


def helpers_begun(run: Run) -> int:
    """Return how many helpers began to load data."""
    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return sum(event["event"] == "prefetching" for event in events)


def test_slow_data_are_drawn_ahead_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = train(recipe(tmp_path, monkeypatch), 1, prefetch="off")
    slow = recipe(tmp_path, monkeypatch, seconds=0.001)
    assert helpers_begun(quick) == 0
    for placed in (
        {"workers": 1},
        {"workers": 2, "exchange": "gloo"},
        {"workers": 2, "balance": "random"},
        {"workers": 3, "balance": "random"},
    ):
        run = train(slow, **placed)
        assert helpers_begun(run) == placed["workers"]
        assert results(run) == results(quick)


def test_an_error_in_a_data_set_comes_with_the_users_frames(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Plan(SIZE, 24, 6, 0).order(0)[-1].item()
    bad = recipe(tmp_path, monkeypatch, seconds=0.001, bad=last)
    with pytest.raises(Exception, match=f"sample {last} is rotten") as caught:
        train(bad, 1, max_restarts=0)
    shown = str(getattr(caught.value, "details", {}).get("traceback"))
    assert "in __getitem__" in shown
    assert "raise ValueError" in shown


class Source(MicroBatches):
    """Micro-batches without data."""

    reader, has_user_code = None, True

    def __init__(self) -> None:
        """Count what is drawn here."""
        self.drawn: list[tuple[int, int]] = []

    def draw(self, step: int, index: int) -> prefetch.Drawn:
        self.drawn.append((step, index))
        seed = derive_seed(0, step, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        noise = random.random() + np.random.rand()
        return torch.rand(2, 3) + noise, Mixed(*torch.rand(3, 2))


@pytest.fixture
def fed() -> "tuple[Prefetcher, Source, prefetch.HelperProcess]":
    source = Source()
    helper = prefetch.HelperProcess.start(Source, [])
    found = Prefetcher(source, helper, lambda: None, is_slow=True)
    found.draw(0, 0, (0, 1))
    assert helper.connection.poll(DEADLINE)
    source.drawn.clear()
    return found, source, helper


def check(drawn: prefetch.Drawn, step: int, index: int) -> None:
    """Check the values, and that the generators continue alike."""
    after = torch.rand(5).tolist(), random.random(), np.random.rand()
    inputs, targets = Source().draw(step, index)
    assert after == (torch.rand(5).tolist(), random.random(), np.random.rand())
    assert torch.equal(drawn[0], inputs)
    assert isinstance(drawn[1], Mixed)
    assert isinstance(targets, Mixed)
    assert all(map(torch.equal, drawn[1].parts, targets.parts))


def test_the_helper_draws_also_after_a_change_of_owner(
    fed: "tuple[Prefetcher, Source, prefetch.HelperProcess]",
) -> None:
    found, source, _ = fed
    for step, owned in (
        (0, (1, 3)),
        (1, (1, 3)),
        (2, (0, 2)),
        (3, (0, 2)),
        (4, (3, 3)),
    ):
        for index in range(*owned):
            check(found.draw(step, index, owned), step, index)
    assert source.drawn == []


def test_a_micro_batch_that_is_drawn_twice_leaves_the_same_generators(
    fed: "tuple[Prefetcher, Source, prefetch.HelperProcess]",
) -> None:
    found, source, _ = fed
    for step in range(3):
        for index in (1, 1, 0):
            check(found.draw(step, index, (0, 2)), step, index)
    assert source.drawn == []


def test_a_helper_that_still_loads_is_not_waited_for(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def load() -> Source:
        gate.read_text()  # until the test writes
        return Source()

    source, helper = Source(), prefetch.HelperProcess.start(load, [])
    found = Prefetcher(source, helper, lambda: None, is_slow=True)
    for index in range(3):
        check(found.draw(0, index, (0, 3)), 0, index)
    assert source.drawn == [(0, 0), (0, 1), (0, 2)]
    gate.write_text("go")
    assert helper.connection.poll(DEADLINE)
    for index in range(3):
        check(found.draw(1, index, (0, 3)), 1, index)
    assert len(source.drawn) == 3


def test_the_worker_draws_for_itself_after_its_helper_was_killed(
    fed: "tuple[Prefetcher, Source, prefetch.HelperProcess]",
) -> None:
    found, source, helper = fed
    check(found.draw(0, 0, (0, 2)), 0, 0)
    os.kill(helper.pid, signal.SIGKILL)
    os.waitpid(helper.pid, 0)
    for step, index in ((0, 1), (1, 0), (1, 1), (2, 0), (2, 1)):
        check(found.draw(step, index, (0, 2)), step, index)
    assert source.drawn[-2:] == [(2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("micro_batches", "data_seconds", "seconds", "expected"),
    [(100, 0.5, 4.0, True), (100, 0.5, 6.0, False), (1000, 0.5, 4.0, False)],
)
def test_only_slow_data_are_drawn_ahead(
    micro_batches: int, data_seconds: float, seconds: float, expected: bool
) -> None:
    reports: list[bool] = []
    helper = prefetch.HelperProcess.start(Source, [])
    found = Prefetcher(Source(), helper, lambda: reports.append(True))
    found.observe(micro_batches, data_seconds, seconds)
    found.draw(0, 0, (0, 1))
    assert bool(reports) == expected


def test_arrays_in_memory_are_told_from_objects_that_load_samples() -> None:
    """A helper that sends them would take longer than picking them."""
    some = torch.arange(2)
    arrays = Part(Arrays(torch.zeros(4, 2), torch.zeros(4)), some)
    assert is_in_memory(Converted(arrays, "regression", torch.float64))
    assert not is_in_memory(Part(Indexed([], "the data", is_train=True), some))
