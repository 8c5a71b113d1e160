"""Streams in `samestep train`: of unknown length, at any number of workers."""

import json
from typing import Any

import pytest
from conftest import Own, Train, fault

import samestep
from samestep import OwnCodeError, RecipeError, TrainingError


STREAMS = """
from torch.utils.data import DataLoader, IterableDataset

class Stream(IterableDataset):
    classes = [0, 1, 2]
    def __init__(self, n=100):
        self.n = n
        self.x, self.y = some(min(n, 100))
        self.epoch = 0
    def set_epoch(self, epoch):
        self.epoch = epoch
    def __iter__(self):
        for i in torch.randperm(self.n).tolist():
            yield self.x[i] + self.epoch + torch.rand(()), int(self.y[i])

class Told(Stream):
    at, start = 0, 0
    def __iter__(self):
        order = random.Random(self.epoch).sample(range(self.n), self.n)
        self.at, self.start = self.start, 0
        while self.at < self.n:
            i = order[self.at]
            self.at += 1
            print("read", self.epoch, i, flush=True)
            yield {"x": self.x[i] + torch.rand(()), "label": int(self.y[i])}
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.start = state["at"]

class Rotten(Stream):
    def __iter__(self):
        for i in range(self.n):
            if i == 40:
                raise ValueError(f"sample {i} is rotten")
            yield self.x[i], int(self.y[i])

class InOrder(IterableDataset):
    classes = [0, 1, 2]
    def __iter__(self):
        x, y = some()
        return iter([(x[i], int(y[i])) for i in range(100)])

class Endless(Told):
    def __init__(self):
        super().__init__(1 << 40)
    def __iter__(self):
        self.at, self.start = self.start, 0
        while True:
            i = (self.at * 7) % 100
            self.at += 1
            yield self.x[i] + self.at % 9, int(self.y[i])

class Plain:
    def __init__(self):
        self.stream = Stream(61)
        self.classes = [0, 1, 2]
    def __iter__(self):
        return iter(self.stream)

def collate(samples):
    x, y = zip(*samples)
    return torch.stack(x) * 2, torch.tensor(y)

def load(kind):
    given = {"batch_size": 16, "collate_fn": collate, "drop_last": True}
    stream = {
        "stream": Stream,
        "state": Told,
        "plain": Plain,
        "endless": Endless,
        "in order": InOrder,
        "indexed": lambda: DataLoader(list(InOrder()), 16),
        "loader": lambda: DataLoader(Stream(70), **given),
        "ahead": lambda: DataLoader(Stream(70), **given, num_workers=1),
        "state ahead": lambda: DataLoader(Told(), 16, num_workers=1),
        "rotten": Rotten,
        "rotten ahead": lambda: DataLoader(Rotten(), 16, num_workers=1),
        "generator": lambda: iter(Stream()),
        "once": lambda: Once(),
    }[kind]()
    return {"train": stream, "validation": Stream(20), "test": DataLoader(Plain(), 9)}

class Once:
    classes = [0, 1, 2]
    def __init__(self):
        self.samples = iter(Stream(8))
    def __iter__(self):
        yield from self.samples
"""


def recipe_of(own: Own, kind: str, **fields: Any) -> samestep.Recipe:
    given = {"global_batch": 16, "micro_batches": 6, "epochs": 2} | fields
    return own(STREAMS, **given, **{"data.arguments": {"kind": kind}})


STEPS = {"stream": 7, "state": 7, "plain": 4, "ahead": 4, "state ahead": 7}


@pytest.mark.parametrize("kind", STEPS)
def test_a_stream_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, own: Own, kind: str
) -> None:
    recipe = recipe_of(own, kind)
    alone = train(recipe, 1, prefetch="off")
    assert alone.history[-1]["epoch"] == 2
    steps = alone.path / "metrics.jsonl"
    last = [json.loads(line) for line in steps.read_text().splitlines()]
    assert max(r["step"] for r in last if "step" in r) == 2 * STEPS[kind]
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        kills = [
            fault("kill", "forward", s, rank=1, number=n) for n, s in ((1, 2), (2, 5))
        ]
        run = train_under(recipe, kills, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        if "ahead" in kind:
            assert "prefetching" in (run.path / "events.jsonl").read_text()
        assert run.result["test_loss"] == alone.result["test_loss"]
        for epoch, other in zip(run.history, alone.history, strict=True):
            assert epoch["train_loss"] == other["train_loss"]
            assert epoch["validation_loss"] == other["validation_loss"]


@pytest.mark.parametrize("kind", ["rotten", "rotten ahead"])
def test_an_error_in_a_stream_comes_with_the_users_frames(
    train: Train, own: Own, kind: str
) -> None:
    with pytest.raises(TrainingError, match="sample 40 is rotten") as caught:
        train(recipe_of(own, kind), 2)
    assert "Epoch 0 of the stream failed: ValueError" in str(caught.value)
    [frames] = caught.value.__notes__
    assert "in __iter__" in frames
    assert "raise ValueError" in frames


@pytest.mark.parametrize("arithmetic", ["torch", "portable"])
def test_a_stream_is_the_data_set_with_the_same_order(
    train: Train, own: Own, arithmetic: str
) -> None:
    indexed = train(recipe_of(own, "indexed", arithmetic=arithmetic), 2)
    for workers in (1, 3):
        run = train(recipe_of(own, "in order", arithmetic=arithmetic), workers)
        assert run.weights_sha256 == indexed.weights_sha256
        assert run.history[-1]["train_loss"] == indexed.history[-1]["train_loss"]


def test_an_endless_stream_is_trained_for_max_steps(
    train: Train, train_under: Train, own: Own
) -> None:
    fields = {"schedule": {"name": "cosine"}, "max_steps": 9, "epochs": None}
    recipe = recipe_of(own, "endless", **fields)
    alone = train(recipe, 1)
    assert [epoch["step"] for epoch in alone.history] == [9]
    kill = [fault("kill", "forward", 5, rank=0)]
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        run = train_under(recipe, kill, workers, exchange=exchange)
        assert run.weights_sha256 == alone.weights_sha256


def test_what_is_used_up_or_follows_an_unknown_length_is_refused(
    train: Train, own: Own
) -> None:
    with pytest.raises(OwnCodeError, match="generator is used up after one"):
        train(recipe_of(own, "generator"), 1)
    with pytest.raises(TrainingError, match="epoch 0 of the stream had none"):
        train(recipe_of(own, "once"), 1)
    with pytest.raises(RecipeError, match="Set `max_steps` instead of `epochs`"):
        train(recipe_of(own, "stream", schedule={"name": "cosine"}), 1)
