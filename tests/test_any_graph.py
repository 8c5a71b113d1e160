"""Models whose passes differ: branches, layers used again, gradients inside of passes.

In each exchange and in a `Loop`, a parameter without a gradient counts as zero.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault
from torch import nn

from samestep.api.check import check_exactness
from samestep.core.topology import Topology
from samestep.errors import SamestepError, UsageError
from samestep.exchange.shared import SharedExchange
from samestep.state.flat import Flat
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import barrier
from samestep.system.barrier import Waits


BRANCHES = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first = nn.Linear(width, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.never = nn.Linear(8, 8)
        self.last = nn.Linear(8, classes)

    def forward(self, x):
        h = torch.relu(self.first(x))
        chosen = int(x[0, 0] > 0) + int(x[0, 1] > 0)
        if len(x) > 2:  # the dry run has two samples
            h = h + self.experts[chosen](h)
        return self.last(h)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
REENTRANT = """
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, classes)
        self.again = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        h = self.first(x)
        for _ in range(3):
            h = checkpoint(self.again, h, use_reentrant=True)
        return self.last(h)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
FORCES = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1))
        self.last = nn.Linear(width, classes)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            forces, = torch.autograd.grad(
                self.energy(x).sum(), x, create_graph=self.training
            )
        return self.last(forces)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
SPARSE = """
class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)
        self.bags = nn.EmbeddingBag(20, 6, sparse=True, mode="sum")
        self.last = nn.Linear(6, classes)

    def forward(self, x):
        return self.last(self.words(x).sum(1) + self.bags(x))

def build(outputs):
    return Net(outputs)

def load():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(20, (90, 4), generator=generator), torch.arange(90) % 3
"""
KINDS = {"reentrant": REENTRANT, "forces": FORCES, "sparse": SPARSE}


@pytest.mark.parametrize("kind", KINDS)
def test_any_graph_has_one_fingerprint_over_both_exchanges(
    train: Train, own: Own, kind: str
) -> None:
    recipe = own(KINDS[kind])
    alone = train(recipe, 1)
    for workers, exchange in ((2, "gloo"), (3, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange)
        assert run.weights_sha256 == alone.weights_sha256


@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_a_branch_that_is_not_taken_counts_as_zero(
    train: Train, train_under: Train, own: Own, compression: str
) -> None:
    recipe = own(BRANCHES, compression=compression, **{"optimizer.weight_decay": 0.01})
    alone = train(recipe, 1)
    for workers, exchange in ((2, "gloo"), (2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
    killed = train_under(recipe, [fault("kill", "exchange", 1, 1)], 2, exchange="gloo")
    assert killed.weights_sha256 == alone.weights_sha256
    events = map(json.loads, (alone.path / "events.jsonl").read_text().splitlines())
    (unused,) = [event for event in events if event["event"] == "unused"]
    assert unused["parameters"][-2:] == ["never.weight", "never.bias"]


def test_check_ends_with_branches_and_finds_them_exact(
    own: Own, server: ForkServer
) -> None:
    verdict = check_exactness(own(BRANCHES), server=server)
    assert verdict.reasons == []


def test_zeros_are_added_for_what_a_pass_has_not_used() -> None:
    """-0.0 + 0.0 is 0.0, whichever worker computes the second micro-batch."""
    layer, other = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.ModuleList([layer, other])
    found: set[str] = set()
    for used in itertools.permutations((True, False)):
        fd, topology = barrier.create(1), Topology.on_one_node(0, 1)
        exchange = SharedExchange(Flat(model), [(0, 2)], topology, fd, Waits(0.0, 1.0))
        exchange.attach(model)
        for leaf, is_used in enumerate(used):
            with exchange.accumulate(leaf):
                loss = other(torch.ones(1, 1)).sum()
                if is_used:
                    loss = loss - layer(torch.zeros(1, 1)).sum()
                loss.backward()
            exchange.after_backward(leaf)
        os.close(fd)
        gradient, _ = exchange.sum()
        found.add(str(gradient[0].item()))  # of `layer.weight`
    assert found == {"0.0"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "  return super().forward(x) if self.training else self.missing(x)",
            "mine_.* in evaluation mode fails on .*has no attribute 'missing'",
        ),
        (
            "  return super().forward(x)\n"
            "def loss(outputs, targets):\n"
            "  assert torch.is_grad_enabled(), 'in training only'\n"
            "  return functional.cross_entropy(outputs, targets, reduction='none')",
            "mine_.*loss` in evaluation failed: AssertionError: in training only",
        ),
    ],
)
def test_what_fails_in_evaluation_only_is_found_before_the_training(
    train: Train, own: Own, code: str, message: str
) -> None:
    recipe = own(
        "class Net(nn.Linear):\n"
        " def forward(self, x):\n"
        f"{code}\n"
        "def build(inputs, outputs): return Net(*inputs, outputs)\n"
    )
    with pytest.raises(UsageError, match=f"(?s){message}"):
        train(recipe)


LOOP = (
    "import torch\nfrom torch import nn\nfrom torch.nn import functional\n"
    "import samestep\n"
    + BRANCHES
    + """
torch.set_num_threads(1)
torch.manual_seed(0)
model = Net(5, 3)
model.words = nn.Embedding(4, 3, sparse=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loop = samestep.Loop(model, micro_batches=5)
x = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
data = torch.utils.data.TensorDataset(x, torch.arange(60) % 3)
for step in loop.steps(data, 20, 0):
    for inputs, y in step:
        outputs = model(inputs) + model.words(y)
        functional.cross_entropy(outputs, y).backward()
    assert not any(model.never.weight.grad.flatten())
    optimizer.step()
loop.print(loop.fingerprint())
"""
)


def test_a_loop_takes_branches_and_sparse_gradients(tmp_path: Path) -> None:
    file = tmp_path / "branches.py"
    file.write_text(LOOP)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    printed = [
        subprocess.run(
            [sys.executable, *how, file],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for how in ((), torchrun)
    ]
    assert printed[0] == printed[1] != ""


COUNTER = """
class Net(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.tensor(7))

    def forward(self, x):
        if self.training:
            STEP
        return super().forward(functional.dropout(x, 1 / (2 + self.calls.item())))

def build(inputs, outputs):
    return Net(*inputs, outputs)
"""


def test_an_integer_buffer_may_count_passes(
    train: Train, train_under: Train, own: Own
) -> None:
    # The last step has 7 samples for 9 micro-batches: two have none.
    fields: dict[str, Any] = {"global_batch": 63, "micro_batches": 9}
    recipe = own(COUNTER.replace("STEP", "self.calls += 1"), **fields)
    alone = train(recipe, 1)
    kills = [fault("kill", "exchange", 1, 1)]
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        run = train_under(recipe, kills, workers, exchange=exchange)
        assert run.weights_sha256 == alone.weights_sha256
    assert alone.load_model().calls == 9 + 7


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("self.calls += len(x)", "an integer that grows by 1 in each pass; `calls`"),
        ("self.calls += 1 + (len(x) > 2)", "`calls` grew by 2 in 1"),
    ],
)
def test_an_integer_buffer_that_does_something_else_is_refused(
    train: Train, own: Own, step: str, message: str
) -> None:
    with pytest.raises(SamestepError, match=message):
        train(own(COUNTER.replace("STEP", step)))
