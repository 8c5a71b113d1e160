"""Losses that are divided by a count of their own, such as that of valid targets."""

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Own, Train, fault
from torch import Tensor, nn
from torch.nn import functional

import samestep
from samestep import Recipe, RecipeError, Run, TrainingError
from samestep.config.data import CustomData
from samestep.config.model import CrossEntropy
from samestep.core.plan import Plan
from samestep.data.sources import user_dataset
from samestep.data.targets import Labels
from samestep.errors import DataError
from samestep.models.objective import Objective
from samestep.supervisor.forkserver_client import ForkServer
from samestep.user_code.references import UserCode


PADDED = """
def padded(n):
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randint(9, (n, 33), generator=generator)
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    for row in range(n):
        y[row, (1 + row**3) % 37 % 33:] = -100  # from 0 to 32 targets
    return x, y

def load():
    return {"train": padded(15), "validation": padded(7), "test": padded(5)}

def build(outputs):
    net = nn.Embedding(outputs, outputs)
    nn.init.zeros_(net.weight)
    return net
"""
COUNTED = """
def loss(outputs, targets):
    total = functional.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    return total, (targets != -100).sum()
"""
WEIGHTED = """
WEIGHTS = torch.arange(1.0, 4.0)

def loss(outputs, targets):
    total = functional.cross_entropy(outputs, targets, WEIGHTS, reduction="sum")
    right = outputs.argmax(1) == targets
    return total, WEIGHTS[targets].sum(), {"right": (right.sum(), len(targets))}
"""
STEPS: dict[str, Any] = {
    "global_batch": 12,  # and 3, which leave 3 of 6 micro-batches empty
    "micro_batches": 6,
    "evaluation_batch": 2,
    "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0},
}
IGNORING = {"loss": {"name": "cross-entropy", "ignore_index": -100}}


PADDED_BY_BATCH = """
class Sequences(Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return torch.randint(9, (2 + i * i % 11,), generator=generator)
    def collate_fn(self, samples):
        pad = nn.utils.rnn.pad_sequence
        rows = [pad(s, True, v) for s, v in (([x[:-1] for x in samples], 0),
                                             ([x[1:] for x in samples], -100))]
        return tuple(rows)

def load():
    return Sequences()

def build():
    return nn.Embedding(9, 9)
"""


def in_float64(code: Path, recipe: Recipe) -> tuple[Tensor, float]:
    """Return weights and loss of the epoch if every global batch is one batch."""
    inputs, targets = runpy.run_path(str(code))["load"]()["train"]
    weight = torch.zeros(9, 9, dtype=torch.float64, requires_grad=True)
    order = Plan(15, 12, 6, recipe.seed).order(0)
    sums, counts = [], []
    for samples in torch.split(order, 12):
        logits, wanted = (
            weight[inputs[samples]].flatten(0, 1),
            targets[samples].flatten(),
        )
        loss = functional.cross_entropy(logits, wanted, reduction="mean")
        (gradient,) = torch.autograd.grad(loss, weight)
        counts.append(int((wanted >= 0).sum()))
        sums.append(loss.item() * counts[-1])
        weight = (weight - gradient).detach().requires_grad_()
    return weight.detach(), sum(sums) / sum(counts)


def losses(run: Run) -> list[float]:
    names = ("train_loss", "validation_loss", "validation_accuracy")
    return [*(run.history[-1][name] for name in names), run.result["test_loss"]]


@pytest.mark.parametrize("whose", ["own", "built-in"])
def test_the_gradient_is_that_of_one_float64_batch_at_any_placement(
    train: Train, own: Own, tmp_path: Path, server: ForkServer, whose: str
) -> None:
    is_own = whose == "own"
    recipe = own(PADDED + COUNTED * is_own, **STEPS, **({} if is_own else IGNORING))
    alone = train(recipe, 1)
    (code,) = tmp_path.glob("mine_*.py")
    weight, loss = in_float64(code, recipe)
    found = alone.load_model().state_dict()["weight"].double()
    assert (found - weight).norm() < 1e-6 * weight.norm()
    assert alone.history[0]["train_loss"] == pytest.approx(loss, rel=1e-6)
    for workers, exchange in ((2, "gloo"), (3, "shared"), (5, "gloo"), (5, "shared")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert losses(run) == losses(alone)
    again = samestep.evaluate(alone, workers=2, server=server)
    assert again.loss == alone.result["test_loss"]
    _, targets = runpy.run_path(str(code))["load"]()["test"]
    assert again.targets == int((targets >= 0).sum())
    assert again.own_metrics == []


def test_clipping_rounding_noise_and_kills_have_one_fingerprint(
    train: Train, train_under: Train, own: Own
) -> None:
    fields = {"optimizer.max_grad_norm": 0.1, "compression": "bf16", "epochs": 2}
    recipe = own(PADDED + COUNTED, **STEPS).changed(fields)
    alone = train(recipe, 1)
    kill = fault("kill", "exchange", 3, rank=1)
    run = train_under(recipe, [kill], 3, exchange="gloo", balance="random")
    assert run.result["restarts"] == 1
    assert run.weights_sha256 == alone.weights_sha256
    assert losses(run) == losses(alone)
    noise = [run.history[-1]["noise_scale"], alone.history[-1]["noise_scale"]]
    assert noise[0] == noise[1]


def test_batches_that_are_padded_each_to_its_own_length_have_to_count(
    train: Train, own: Own
) -> None:
    fields = {"data.outputs": 9, "data.task": "next-token", **STEPS}
    recipe = own(PADDED_BY_BATCH + COUNTED, **fields)
    alone, others = train(recipe, 1), train(recipe, 3, exchange="gloo")
    assert others.weights_sha256 == alone.weights_sha256
    assert losses(others) == losses(alone)
    total = COUNTED.replace("return total, (targets != -100).sum()", "return total")
    with pytest.raises(TrainingError, match="samples must have equally many: first"):
        train(own(PADDED_BY_BATCH + total, **fields))


def test_a_loss_that_counts_all_targets_has_the_bits_of_the_sum(
    train: Train, own: Own
) -> None:
    sums = own(
        "def loss(outputs, y):\n"
        " return functional.cross_entropy(outputs, y, reduction='sum')\n"
    )
    counts = own(
        "def loss(outputs, y):\n"
        " return functional.cross_entropy(outputs, y, reduction='sum'), len(y)\n"
    )
    runs = [train(recipe, 2) for recipe in (sums, counts)]
    assert runs[0].weights_sha256 == runs[1].weights_sha256
    assert losses(runs[0]) == losses(runs[1])
    noise = [run.history[0]["noise_scale"] for run in runs]
    assert noise[0] == pytest.approx(noise[1])


def test_a_count_may_be_the_sum_of_weights_beside_metrics(
    train: Train, own: Own, tmp_path: Path
) -> None:
    recipe = own(WEIGHTED)
    run = train(recipe, 3)
    assert run.weights_sha256 == train(recipe, 1).weights_sha256
    (code,) = tmp_path.glob("mine_*.py")
    names = runpy.run_path(str(code))
    inputs, targets = names["load"]()["test"]
    with torch.inference_mode():
        logits = run.load_model()(inputs)
    mean = functional.cross_entropy(logits, targets, names["WEIGHTS"])
    assert run.result["test_loss"] == pytest.approx(mean.item())
    assert run.result["test_right"] == int((logits.argmax(1) == targets).sum()) / 15
    assert run.result["own_metrics"] == ["right"]


def test_a_step_of_padding_alone_has_no_gradient_and_says_so(
    train: Train, own: Own
) -> None:
    code = (
        "def load():\n"
        " x, y = padded(24)\n"
        " y[:] = -100\n"
        " return {'train': (x, y), 'test': padded(5)}\n"
    )
    recipe = own(PADDED + code, **STEPS, **IGNORING)
    run = train(recipe, 2)
    assert run.load_model().state_dict()["weight"].count_nonzero() == 0
    assert run.history[0]["train_loss"] == 0
    assert "train_accuracy" not in run.history[0]
    lines = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    said = [line["step"] for line in lines if line["event"] == "no targets"]
    assert said == [1, 2]


def test_an_evaluation_of_padding_alone_is_an_error(train: Train, own: Own) -> None:
    code = (
        "def load():\n"
        " x, y = padded(24)\n"
        " return {'train': (x, y), 'validation': (x, torch.full_like(y, -100))}\n"
    )
    with pytest.raises(TrainingError, match="No target of the split `validation`"):
        train(own(PADDED + code, **STEPS, **IGNORING), 2)


def test_the_built_in_loss_ignores_and_smooths_as_torch_does() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(40, 5, requires_grad=True), torch.arange(40) % 6 - 1
    for smoothing, ignored in itertools.product((0.0, 0.1), (-1, 3)):
        chosen = targets if ignored == -1 else targets.abs()
        section = CrossEntropy(label_smoothing=smoothing, ignore_index=ignored)
        loss, cells = Objective(nn.Identity(), section)(logits, chosen)
        wanted = functional.cross_entropy(
            logits, chosen, label_smoothing=smoothing, ignore_index=ignored
        )
        total, count, right, valid = cells.tolist()
        torch.testing.assert_close(loss / count, wanted)
        assert total == loss.item()
        assert count == valid == int((chosen != ignored).sum())
        is_right = (logits.argmax(1) == chosen) & (chosen != ignored)
        assert right == int(is_right.sum())


def test_what_is_ignored_is_no_class(train: Train, own: Own) -> None:
    code = (
        "def load():\n x, y = some()\n y[::4] = 255\n"
        " return {'train': (x[:80], y[:80]), 'test': (x[80:], y[80:])}\n"
    )
    run = train(own(code, loss={"name": "cross-entropy", "ignore_index": 255}), 2)
    confusion = run.result["test_confusion"]
    assert [len(row) for row in confusion] == [3, 3, 3]
    assert sum(map(sum, confusion)) == 15
    assert all(each["index"] % 4 for each in run.result["test_worst"])


def loaded(labels: Labels) -> int:
    """Return the number of classes of a data set with a padded label."""
    targets = torch.tensor([0, 2, -100, 1])
    given = (torch.ones(4, 3), targets)
    recipe = CustomData(load="sha256:0", validation=0.0, test=0.0)
    _, facts = user_dataset.load(
        recipe, UserCode([], {"sha256:0": lambda: given}), labels
    )
    return facts.outputs


def test_labels_are_what_the_loss_takes() -> None:
    assert loaded(Labels(are_checked=False)) == 3
    assert loaded(Labels(ignored=-100)) == 3
    with pytest.raises(DataError, match=r"set `loss\.ignore_index = -100`"):
        loaded(Labels())
    with pytest.raises(DataError, match=r"has -100\.$"):
        loaded(Labels(ignored=-1))


def test_mixed_classes_cannot_be_ignored(own: Own) -> None:
    fields = {**IGNORING, "data.augment": {"mixup": 0.2}}
    with pytest.raises(RecipeError, match=r"mixup` is 0\.2, `loss\.ignore_index` -100"):
        own("", **fields)
