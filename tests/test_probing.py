"""State that own code hides is found by the training itself, at any placement."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault
from torch import nn

from samestep.errors import NotReproducible, SamestepError
from samestep.messages.processes import ReplayResult
from samestep.state.flat import Flat
from samestep.system.heartbeat import Heartbeat
from samestep.verification.mutation_check import MutationCheck
from samestep.verification.probe import Probe


MODEL = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(width, 4), nn.Linear(4, classes)
        {state}

    def forward(self, x):
        h = self.first(x)
        if self.training:
            {change}
        return self.last(h)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
HIDDEN = {
    "a counter that matters late": (
        "self.calls = 0",
        "self.calls += 1; h = h * (1 + (self.calls > 9))",
    ),
    "a memory bank": (
        "self.bank = []",
        "self.bank = [*self.bank, h.detach().mean()][-8:]; h = h + sum(self.bank)",
    ),
    "what the first pass saw": (
        "self.shift = None",
        "self.shift = h.detach().mean() if self.shift is None else self.shift;"
        " h = h - self.shift",
    ),
    "the time": ("pass", "import time; h = h + time.time() % 1"),
    "its own generator": (
        "self.own = np.random.default_rng(0)",
        "h = h + float(self.own.random())",
    ),
}
WATCHED = {
    "a frozen parameter": (
        "self.slow = nn.Parameter(torch.ones(4), requires_grad=False)",
        "self.slow.data = 0.9 * self.slow.data + 0.1; self.slow.data[0] += 1;"
        " h = h * self.slow",
        "the frozen parameter `slow`",
    ),
    "a buffer that changes late": (
        "self.register_buffer('seen', torch.zeros(()));"
        " self.register_buffer('late', torch.zeros(()))",
        "self.seen += 1; late = (self.seen > 2).float();"
        " late and self.late.add_(late); h = h + self.late",
        "the buffer `late`",
    ),
    "a buffer that is not saved": (
        "self.register_buffer('seen', torch.zeros(()), persistent=False)",
        "x.shape[0] and self.seen.add_(x.mean() > 0.4); h = h + self.seen",
        "`seen`",
    ),
    "a buffer that is replaced": (
        "self.register_buffer('mean', torch.zeros(4))",
        "self.mean.mul_(0.5); self.mean = self.mean + h.detach().mean();"
        " h = h + self.mean",
        "replaced `mean`",
    ),
    "a parameter": (
        "pass",
        "self.last.weight.data = self.last.weight.data.clamp(-0.1, 0.1)",
        "changed `last.weight`",
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", HIDDEN)
def test_hidden_state_ends_a_training(
    own: Own, train: Train, kind: str, workers: int
) -> None:
    state, change = HIDDEN[kind]
    recipe = own(MODEL.format(state=state, change=change), epochs=2)
    with pytest.raises(NotReproducible, match="gave another result in another"):
        train(recipe, workers)
    assert train(recipe, workers, probe=False).status == "finished"


@pytest.mark.parametrize("kind", WATCHED)
def test_what_a_pass_must_leave_alone_is_watched_in_every_pass(
    own: Own, train: Train, kind: str
) -> None:
    state, change, message = WATCHED[kind]
    recipe = own(MODEL.format(state=state, change=change), epochs=2)
    with pytest.raises(SamestepError, match=re.escape(message)):
        train(recipe, 2, probe=False)


def test_what_a_restart_computes_again_is_the_same_again(
    own: Own, train_under: Train
) -> None:
    state, change = HIDDEN["a counter that matters late"]
    recipe = own(MODEL.format(state=state, change=change), epochs=2)
    in_the_second_snapshot = fault("kill", "snapshot", 3, 0)
    # How much had been reported before the kill decides what is compared first.
    with pytest.raises(NotReproducible, match="computed again after a restart"):
        train_under(recipe, [in_the_second_snapshot], 1, probe=False)


def test_a_data_set_that_counts_its_calls_is_found(own: Own, train: Train) -> None:
    recipe = own(
        "class Counting(Dataset):\n"
        " calls = 0\n"
        " def __init__(self): self.x, self.y = some()\n"
        " def __len__(self): return 100\n"
        " def __getitem__(self, i):\n"
        "  self.calls += 1\n"
        "  return self.x[i] * (1 + self.calls), self.y[i]\n"
        "def load(): return Counting()\n",
    )
    with pytest.raises(NotReproducible, match="the samples"):
        train(recipe)


def test_a_pass_that_writes_a_parameters_memory_is_found(
    own: Own, train: Train
) -> None:
    change = "self.last.weight.data.clamp_(-0.1, 0.1)"
    recipe = own(MODEL.format(state="pass", change=change))
    with pytest.raises(NotReproducible, match="a pass through the model changed some"):
        train(recipe)


def test_a_witness_that_cannot_load_is_a_warning(
    own: Own, train: Train, tmp_path: Path
) -> None:
    recipe = own(
        "import os\n"
        "def load():\n"
        f" os.open('{tmp_path}/taken', os.O_CREAT | os.O_EXCL)\n"
        " return some()\n"
    )
    run = train(recipe)
    events = (run.path / "events.jsonl").read_text().splitlines()
    texts = [e["text"] for e in map(json.loads, events) if e["event"] == "warning"]
    assert len(texts) == 1
    assert "FileExistsError" in texts[0]


def test_the_probe_changes_no_bit(own: Own, train: Train) -> None:
    recipe = own("", epochs=2)
    shas = {train(recipe, 2, probe=on).weights_sha256 for on in (True, False)}
    assert len(shas) == 1


class Late:
    """A witness that answers what it is told to, in the end."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answers: list[ReplayResult] = []

    def ask(self, step: int, *_: object) -> None:
        self.asked.append(step)

    def answer(self, _: float) -> ReplayResult | None:
        return self.answers.pop(0) if self.answers else None


def probe_of(witness: Late) -> Probe:
    """The probe of the only worker."""
    digest = {"the loss": 64 * "0"}
    alone: Any = SimpleNamespace(workers=1, merge=lambda values: values)
    replay: Any = SimpleNamespace(digest=lambda _: digest, flat=None)
    heartbeat = Heartbeat(Heartbeat.create(1))
    told: Any = witness
    return Probe(replay, alone, torch.zeros(1), 0, heartbeat, warn, told, timeout=0.1)


def warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def test_a_late_witness_is_asked_for_the_newest_step_next() -> None:
    witness = Late()
    probe = probe_of(witness)
    for step in (0, 5, 9):
        probe.run(step)
    assert witness.asked == [0]
    witness.answers = [ReplayResult(digests={"the loss": 64 * "0"}) for _ in range(2)]
    probe.finish()
    assert witness.asked == [0, 9]
    assert not witness.answers


def test_workers_wait_for_each_other_after_the_last_question_to_the_witness() -> None:
    """Otherwise one of them changes the weights that another is about to send."""
    witness, asked_before = Late(), list[list[int]]()
    probe = probe_of(witness)

    def merge(values: torch.Tensor) -> torch.Tensor:
        asked_before.append(witness.asked.copy())
        return values

    probe.exchange.merge = merge  # type: ignore[method-assign]
    probe.run(0)
    probe.run(5)
    witness.answers = [ReplayResult(digests={"the loss": 64 * "0"}) for _ in range(2)]
    probe.finish()
    assert asked_before[-1] == [0, 5]


def test_the_end_waits_for_the_last_answer_of_the_witness() -> None:
    witness = Late()
    probe = probe_of(witness)
    probe.run(3)
    witness.answers = [ReplayResult(digests={"the loss": 64 * "1"})]
    with pytest.raises(NotReproducible, match="another process: the loss at step 4"):
        probe.finish()


def test_a_witness_that_never_answers_is_a_warning() -> None:
    probe = probe_of(Late())
    probe.run(0)
    with pytest.warns(UserWarning, match="it has not answered for"):
        probe.finish()


def test_a_change_that_leaves_the_content_is_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    model.register_buffer("table", torch.arange(3))
    watch = MutationCheck(model, Flat(model), "it")
    model.register_buffer("table", torch.arange(3))
    frozen = model.get_parameter("1.weight")
    frozen.data = frozen.data.clone()
    watch.check()
    model.register_buffer("table", torch.arange(4))
    with pytest.raises(NotReproducible, match="`table`"):
        watch.check()


def test_what_changes_between_two_steps_is_noted() -> None:
    model = nn.Linear(2, 2)
    watch = MutationCheck(model, Flat(model), "it")
    nn.init.zeros_(model.weight)
    with pytest.raises(NotReproducible, match="`weight`"):
        watch.check()
    watch.note()
    watch.check()
