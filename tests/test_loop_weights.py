"""`Loop.weigh`: means over valid targets; and what may not happen within a step."""

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from test_loop import by_workers, data, network
from torch import Tensor, nn
from torch.nn import functional

import samestep
from samestep import OwnCodeError
from samestep.core.plan import Plan


HEAD = """
import json, torch
from torch import nn
from torch.nn import functional
import samestep

class Padded(torch.utils.data.Dataset):
    "Sequences of 0 to 32 targets."
    def __len__(self):
        return 15
    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(9, (33,), generator=generator)
        labels = tokens[1:].clone()
        labels[(1 + i**3) % 37 % 33:] = -100
        return {"input_ids": tokens[:-1], "labels": labels}

class Model(nn.Module):
    "As those of Hugging Face: the loss is the mean over the valid labels."
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 9)
        nn.init.zeros_(self.embedding.weight)
    def forward(self, input_ids, labels):
        logits = self.embedding(input_ids).flatten(0, 1)
        return functional.cross_entropy(logits, labels.flatten(), reduction=REDUCTION)
"""
SCRIPT = (
    HEAD
    + """
torch.set_num_threads(1)
for REDUCTION in ("mean", "sum"):
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loop = samestep.Loop(model, micro_batches=6, reduction=REDUCTION)
    for step in loop.steps(Padded(), 12, epoch=0):  # and 3 samples
        for batch in step:
            loss = model(**batch)
            loss.backward()
            count = (batch["labels"] != -100).sum()
            loop.weigh(count)
            sum = loss * count if REDUCTION == "mean" and count else loss
            loop.add(loss=(sum.nan_to_num(), count))
        optimizer.step()
    found = [loop.fingerprint(), loop.mean(), model.embedding.weight.tolist()]
    loop.print(json.dumps(found))
"""
)


def in_float64(head: Path) -> tuple[Tensor, float]:
    """Return the weights and the mean loss if every global batch is one batch."""
    padded = runpy.run_path(str(head))["Padded"]()
    samples = [padded[i] for i in range(15)]
    weight = torch.zeros(9, 9, dtype=torch.float64, requires_grad=True)
    order = Plan(15, 12, 6, 0).order(0)
    total = count = 0.0
    for part in torch.split(order, 12):
        inputs, labels = (
            torch.cat([samples[i][key] for i in part.tolist()])
            for key in ("input_ids", "labels")
        )
        loss = functional.cross_entropy(weight[inputs], labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        valid = int((labels != -100).sum())
        total, count = total + loss.item() * valid, count + valid
        weight = (weight - gradient).detach().requires_grad_()
    return weight.detach(), total / count


def test_a_weighed_gradient_is_that_of_one_float64_batch_at_any_number_of_workers(
    tmp_path: Path,
) -> None:
    lines = by_workers(SCRIPT, tmp_path, 1, 2, 3, 5)
    assert lines == lines[:2] * 4
    (tmp_path / "head.py").write_text(HEAD)
    weight, loss = in_float64(tmp_path / "head.py")
    for _, mean, found in map(json.loads, lines[:2]):
        error = torch.tensor(found, dtype=torch.float64) - weight
        assert error.norm() < 1e-6 * weight.norm()
        assert mean["loss"] == pytest.approx(loss, rel=1e-6)


Body = Callable[[samestep.Loop, Tensor], None]


def gradients(
    body: Body, reduction: Literal["mean", "sum"] = "mean", micro_batches: int = 4
) -> list[Tensor]:
    """Return gradients after 10 samples; call the body after each backward pass."""
    model = network()
    loop = samestep.Loop(model, micro_batches, reduction=reduction)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    for x, y in next(loop.steps(data(), 10, epoch=0)):
        criterion(model(x), y).backward()
        body(loop, y)
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_whoever_counts_all_samples_has_the_bits_of_whoever_counts_none() -> None:
    plain = gradients(lambda loop, y: None)
    weighed = gradients(lambda loop, y: loop.weigh(len(y)))
    assert all(map(torch.equal, plain, weighed))


def test_a_weighed_sum_is_divided_by_the_counts() -> None:
    total = gradients(lambda loop, y: None, "sum")
    weighed = gradients(lambda loop, y: loop.weigh(0.5 * len(y)), "sum")
    for one, other in zip(total, weighed, strict=True):
        torch.testing.assert_close(one / 5, other)


def test_a_step_without_a_target_that_counts_has_no_gradient_and_says_so() -> None:
    with pytest.warns(UserWarning, match="No target of this step counts"):
        found = gradients(lambda loop, y: loop.weigh(0))
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda loop, y: loop.weigh(-1), "neither is negative; `weigh` received -1"),
        (lambda loop, y: loop.weigh(math.nan), "`weigh` received nan"),
        (lambda loop, y: [loop.weigh(1), loop.weigh(1)], "call it once for each"),
        (lambda loop, y: len(y) > 2 and loop.weigh(1), "2 of 4 were. Call `weigh`"),
    ],
)
def test_weighing_otherwise_is_an_error(body: Body, message: str) -> None:
    with pytest.raises(OwnCodeError, match=message):
        gradients(body)


def test_only_a_micro_batch_of_a_step_is_weighed() -> None:
    loop = samestep.Loop(network(), micro_batches=2)
    with pytest.raises(OwnCodeError, match="in the loop over the micro-batches"):
        loop.weigh(1)
    next(loop.share(data(), 10))
    with pytest.raises(OwnCodeError, match="in the loop over the micro-batches"):
        loop.weigh(1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused": lambda p: torch.optim.Adam(p, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_step_within_the_micro_batches_is_refused(kind: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[kind](model.parameters())
    loop = samestep.Loop(model, micro_batches=2)
    for step in loop.steps(data(), 10, epoch=0):
        for x, y in step:
            torch.autograd.backward(functional.cross_entropy(model(x), y))
            with pytest.raises(OwnCodeError, match=r"Call `optimizer\.step\(\)` after"):
                optimizer.step()
        optimizer.step()
        break


def test_weights_that_change_within_a_step_are_refused() -> None:
    model = network()
    step = next(samestep.Loop(model, micro_batches=2).steps(data(), 10, epoch=0))
    x, _ = next(step)
    model(x).sum().backward()
    with torch.no_grad():
        next(model.parameters()).clamp_(-0.01, 0.01)
    with pytest.raises(OwnCodeError, match="they were changed"):
        next(step)


def test_a_network_that_another_optimizer_trains_beside_the_loop_is_refused() -> None:
    """A GAN in the usual form: the discriminator would depend on the worker."""
    model, critic = network(), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.1)
    step = next(samestep.Loop(model, micro_batches=2).steps(data(), 10, epoch=0))
    for turn in range(2):
        x, _ = next(step)
        critic(model(x)).sum().backward()
        if turn == 0:  # which may be an optimizer of this micro-batch alone
            optimizer.step()
    with pytest.raises(OwnCodeError, match="have a `Loop` each"):
        optimizer.step()


def test_an_optimizer_of_one_micro_batch_may_attack_its_inputs() -> None:
    def attack(loop: samestep.Loop, y: Tensor) -> None:
        noise = torch.zeros(len(y), 5, requires_grad=True)
        optimizer = torch.optim.SGD([noise], lr=0.1)
        for _ in range(2):
            torch.autograd.backward(noise.sum())
            optimizer.step()

    assert len(gradients(attack)) == 4


GAN = """
import torch
from torch import nn
import samestep

torch.set_num_threads(1)
torch.manual_seed(0)
real = torch.randn(20, 4) + 3
generator = nn.Linear(2, 4)
critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
loops = [samestep.Loop(network, micro_batches=3) for network in (critic, generator)]
optimizers = [torch.optim.Adam(n.parameters(), 0.05) for n in (critic, generator)]
label = nn.functional.binary_cross_entropy_with_logits
for epoch in range(2):
    steps = (loop.steps(range(20), 8, epoch) for loop in loops)
    for critic_step, generator_step in zip(*steps):
        for i in critic_step:
            made, wanted = generator(torch.randn(len(i), 2)), torch.ones(len(i), 1)
            label(critic(real[i]), wanted).backward()
            label(critic(made.detach()), 0 * wanted).backward()
        optimizers[0].step()
        for i in generator_step:
            made, wanted = generator(torch.randn(len(i), 2)), torch.ones(len(i), 1)
            label(critic(made), wanted).backward()
        optimizers[1].step()
loops[0].print(*[loop.fingerprint() for loop in loops])
"""


def test_two_networks_that_take_turns_have_a_loop_each(tmp_path: Path) -> None:
    alone, *others = by_workers(GAN, tmp_path, 1, 2, 3)
    assert others == [alone] * 2
