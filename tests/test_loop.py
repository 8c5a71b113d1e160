"""`samestep.Loop`: a user's own loop, with the same bits at any number of workers."""

import difflib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import samestep
from samestep import OwnCodeError, PlacementError
from samestep.core.plan import Plan
from samestep.errors import NotReproducible
from samestep.state.fingerprint import fingerprint


EXAMPLES = Path(__file__).parents[1] / "examples"
DEADLINE = 280.0


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A loop sets the number of torch's threads, which other tests are to find."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def data(size: int = 50) -> TensorDataset:
    inputs = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def started(command: list[str], cwd: Path) -> str:
    """Return the standard output of a command that succeeds."""
    ended = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_example_differs_from_a_plain_loop_in_at_most_eight_lines() -> None:
    plain, own = (
        (EXAMPLES / f"{name}_loop.py").read_text().rpartition('"""')[2].split("\n")
        for name in ("plain", "own")
    )
    changed = [
        line
        for line in difflib.unified_diff(plain, own, n=0)
        if line.startswith("+") and line[1:].strip() and not line.startswith("+++")
    ]
    assert len(changed) <= 8, changed


def test_the_guide_shows_the_example() -> None:
    """Its session is carried out by test_docs.py."""
    guide = (EXAMPLES.parent / "docs" / "own-loop.md").read_text()
    code = (EXAMPLES / "own_loop.py").read_text()
    assert code[code.index("loop = samestep.Loop") :] in guide


EVERYTHING = """
import json, random
import numpy as np
import torch
from torch import nn
from torch.nn import functional
import samestep

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 38
    def __getitem__(self, i):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return torch.arange(8.0).view(2, 4) * (i % 3) + noise, i % 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.first = nn.Linear(8, 6)
        self.last = nn.Linear(6, 3)
        self.register_buffer("scale", torch.full((1, 6), 0.1))
    def forward(self, x):
        h = functional.dropout(self.first(self.norm(x).flatten(1)), 0.2, self.training)
        return self.last(h * self.scale)

torch.set_num_threads(1)
torch.manual_seed(0)
model = Net()
model.first.requires_grad_(False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
loop = samestep.Loop(model, micro_batches=6)
found = []
for epoch in range(2):
    model.train()
    for step in loop.steps(Noisy(), 36, epoch):  # the last batch has two samples
        for x, y in step:
            outputs = model(x)
            loss = functional.cross_entropy(outputs, y)
            loss.backward()
            rare = y == 2
            right = outputs.argmax(1) == y
            loop.add(loss=loss * len(y), rare=((right & rare).sum(), rare.sum()))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.param_groups[0]["lr"] = 0.1 + 0.1 * torch.rand(()).item()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        for x, y in loop.share(Noisy(), 5):
            loop.add(samples=len(y))
    found.append([loop.mean(), loop.fingerprint()])
    model.first.requires_grad_(True)
found.append(int(model.norm.num_batches_tracked))
found.append(model.scale.unique().tolist())
loop.print(json.dumps(found))
"""

FORK = """
import multiprocessing, os, socket, sys
import samestep.loop, torch._dynamo  # which optimizers import

def work(rank, workers, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers)}
    os.environ["LOCAL_WORLD_SIZE"] = str(workers)
    exec(open("script.py").read(), {"__name__": "__main__"})

context = multiprocessing.get_context("fork")
for given in sys.argv[1:]:
    count, _, os.environ["GIVEN"] = given.partition("=")
    workers = int(count)
    with socket.socket() as held:  # so that nobody else gets its port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        places = [(rank, workers, port) for rank in range(workers)]
        crew = [context.Process(target=work, args=place) for place in places]
        [worker.start() for worker in crew]
        [worker.join() for worker in crew]
    assert all(worker.exitcode == 0 for worker in crew)
"""
"""What torchrun does, one number of workers after the other, with one import."""


def by_workers(script: str, cwd: Path, *workers: int | str) -> list[str]:
    """Return the lines that the workers print.

    Of `"2=some"`, two of them find `some` in the environment variable GIVEN.
    """
    (cwd / "script.py").write_text(script)
    return started([sys.executable, "-c", FORK, *map(str, workers)], cwd).splitlines()


IN_FLOAT64 = EVERYTHING.replace("model = Net()", "model = Net().double()").replace(
    "model(x)", "model(x.double())"
)


@pytest.mark.parametrize("script", [EVERYTHING, IN_FLOAT64], ids=["float32", "float64"])
def test_everything_a_loop_does_is_the_same_at_any_number_of_workers(
    tmp_path: Path, script: str
) -> None:
    alone, *others = by_workers(script, tmp_path, 1, 2, 3, 6)
    assert others == [alone] * 3
    first, _, updates, constant = json.loads(alone)
    assert first[0].keys() == {"loss", "rare", "samples"}
    assert first[0]["samples"] == 1.0  # 38 samples by 38
    assert updates == 2 * (6 + 2)
    assert constant == [torch.tensor(0.1).item()]


def test_workers_that_begin_with_other_weights_are_told_to_seed(tmp_path: Path) -> None:
    script = """
import os, torch, samestep
torch.manual_seed(int(os.environ["RANK"]))
try:
    samestep.Loop(torch.nn.Linear(2, 2), micro_batches=2)
except samestep.OwnCodeError as error:
    assert "Call `torch.manual_seed` before building it" in str(error)
else:
    raise AssertionError
"""
    by_workers(script, tmp_path, 2)


def test_with_one_micro_batch_it_is_the_plain_loop() -> None:
    torch.set_num_threads(1)
    inputs, targets = data().tensors
    twins = network(), network()
    plain, ours = (torch.optim.Adam(twin.parameters(), lr=0.1) for twin in twins)
    criterion = nn.CrossEntropyLoss()
    loop = samestep.Loop(twins[1], micro_batches=1, seed=5)
    for step in loop.steps(data(), 16, epoch=2):
        for x, y in step:
            criterion(twins[1](x), y).backward()
        ours.step()
    for samples in torch.split(Plan(50, 16, 1, 5).order(2), 16):
        plain.zero_grad()
        criterion(twins[0](inputs[samples]), targets[samples]).backward()
        plain.step()
    assert fingerprint(twins[0].state_dict()) == loop.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_is_that_of_the_whole_global_batch(
    reduction: Literal["mean", "sum"], dtype: torch.dtype
) -> None:
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    model = network().to(dtype)
    loop = samestep.Loop(model, micro_batches=7, reduction=reduction)
    for x, y in next(loop.steps(data(), 50, epoch=0)):
        criterion(model(x.to(dtype)), y).backward()
    found = [p.grad for p in model.parameters()]
    inputs, targets = data().tensors
    whole = criterion(model(inputs.to(dtype)), targets)
    wanted = torch.autograd.grad(whole, list(model.parameters()))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_model_of_two_types_is_refused_also_when_it_becomes_one() -> None:
    model = network()
    loop = samestep.Loop(model, micro_batches=2)
    model.get_submodule("2").double()
    with pytest.raises(OwnCodeError, match=r"or all float64.*are not: 2\.weight \(t"):
        next(next(loop.steps(data(), 10, epoch=0)))
    model.double()
    for x, _ in next(loop.steps(data(), 10, epoch=0)):
        model(x.double()).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert [gradient.dtype for gradient in gradients] == 4 * [torch.float64]


def test_a_step_that_was_given_up_leaves_nothing_behind() -> None:
    model = network()
    loop = samestep.Loop(model, micro_batches=4)
    found = []
    for given_up in (False, True):
        if given_up:
            x, _ = next(next(loop.steps(data(), 20, epoch=1)))
            model(x).sum().backward()
        for x, _ in next(loop.steps(data(), 20, epoch=0)):
            model(x).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_gradients_that_the_user_keeps_stay_as_they_are() -> None:
    """The exchange adds to what it gets, in memory of its own."""
    model = network()
    loop = samestep.Loop(model, micro_batches=4, reduction="sum")
    kept: list[tuple[Tensor, Tensor]] = []

    def keep() -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        kept.extend((grad, grad.clone()) for grad in grads)

    for step in loop.steps(data(), 25, epoch=0):
        for x, _ in step:
            model(x).sum().backward()
            keep()
        keep()
    assert len(kept) == 2 * (4 + 1) * 4
    assert all(torch.equal(now, then) for now, then in kept)


def test_weights_with_the_channels_last_are_exchanged(tmp_path: Path) -> None:
    script = """
import torch, samestep
torch.manual_seed(0)
model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
loop = samestep.Loop(model, micro_batches=2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in loop.steps(torch.randn(8, 3, 8, 8), 4, epoch=0):
    for x in step:
        model(x).square().mean().backward()
    optimizer.step()
assert model.weight.is_contiguous(memory_format=torch.channels_last)
loop.print(loop.fingerprint())
"""
    alone, two = by_workers(script, tmp_path, 1, 2)
    assert alone == two


def test_any_object_with_a_length_and_an_index_is_data() -> None:
    loop = samestep.Loop(network(), micro_batches=4)
    seen: list[int] = []
    for batch in loop.share(range(10), 3):
        seen += batch.tolist()
        loop.add(ones=1.0)
    assert seen == list(range(10))
    assert loop.mean() == {"ones": 0.4}
    assert loop.mean() == {}
    doubled = loop.share(range(4), 4, collate=lambda samples: [2 * s for s in samples])
    assert list(doubled) == [[0, 2, 4, 6]]


class Forgetful(nn.Module):
    """Without a gradient, or with a buffer that cannot be averaged."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.seen: Tensor
        self.detached = detached

    def forward(self, inputs: Tensor) -> Tensor:
        if self.detached:
            return inputs.clone().requires_grad_()
        self.seen += len(inputs)
        found: Tensor = self.layer(inputs)
        return found


@pytest.mark.parametrize(
    ("detached", "message"),
    [
        (True, "of the model, none has a gradient"),
        (False, r"a persistent float32 buffer.*`seen`"),
    ],
)
def test_a_model_that_cannot_be_exact_is_refused(detached: bool, message: str) -> None:
    model = Forgetful(detached)
    step = next(samestep.Loop(model, micro_batches=2).steps(data(), 10, epoch=0))
    x, _ = next(step)
    model(x).sum().backward()
    with pytest.raises(OwnCodeError, match=message):
        next(step)


class Momentum(nn.Module):
    """A network whose frozen copy, or whose table, changes in later passes."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.now, self.slow = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.part, self.passes = part, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        if self.passes > 2 and self.part == "slow":
            self.slow.weight.data = 0.9 * self.slow.weight + 0.1 * self.now.weight
        if self.passes > 2 and self.part == "table":
            self.register_buffer("table", torch.ones(3), persistent=False)
        outputs: Tensor = self.now(inputs) + self.slow(inputs) + self.table
        return outputs


@pytest.mark.parametrize("part", ["slow", "table"])
def test_what_a_later_pass_changes_is_refused(part: str) -> None:
    model = Momentum(part)
    loop = samestep.Loop(model, micro_batches=2)

    def epoch() -> None:
        for step in loop.steps(data(), global_batch=10, epoch=0):
            for inputs, _ in step:
                model(inputs).mean().backward()

    with pytest.raises(NotReproducible, match=f"`{part}"):
        epoch()


def test_a_loop_that_is_not_used_as_it_must_be_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = samestep.Loop(network(), micro_batches=2)
    steps = loop.steps(data(), 10, epoch=0)
    next(steps)
    with pytest.raises(OwnCodeError, match=r"to their end.*of step 0 of epoch 0"):
        next(steps)
    with pytest.raises(OwnCodeError, match="in the loop over the batches"):
        loop.add(loss=1.0)
    with pytest.raises(OwnCodeError, match="epoch 0 had none"):
        next(loop.steps([], 10, epoch=0))
    with pytest.raises(OwnCodeError, match="received `none`"):
        samestep.Loop(network(), 2, reduction="none")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(PlacementError, match="9 workers cannot share 8 micro-batches"):
        samestep.Loop(network(), micro_batches=8)
