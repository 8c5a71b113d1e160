"""A loss that is a mean is recognized before the training."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Own, Train
from torch import Tensor, nn
from torch.nn import functional

import samestep
from samestep import OwnCodeError
from samestep.api.check import check_exactness
from samestep.data.dataset import Dataset
from samestep.data.sources.user_dataset import Arrays
from samestep.supervisor.forkserver_client import ForkServer
from samestep.verification import dry_run


Loss = Callable[[Any, Any], Any]


def rehearsed(
    loss: Loss, model: nn.Module | None = None, targets: Tensor | None = None
) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(9, 4)
    labels = torch.arange(9) % 3 if targets is None else targets
    recipe = samestep.Recipe.from_dict(
        {
            "name": "own",
            "epochs": 1,
            "global_batch": 8,
            "micro_batches": 2,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "loss": {"name": "custom", "function": "mine:loss"},
        }
    )
    empty = Arrays(inputs[:0], labels[:0])
    splits = {"train": Arrays(inputs, labels), "validation": empty, "test": empty}
    data = Dataset((4,), 3, "classification", splits=dict(splits))
    dry_run.run(recipe, data, model or nn.Linear(4, 3), loss)


class Outputs(nn.Module):
    """Returns what a function makes of the logits."""

    def __init__(
        self, make: Callable[[Tensor, nn.Module], Any], width: int = 3
    ) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, width), make

    def forward(self, inputs: Tensor) -> Any:
        return self.make(self.layer(inputs), self)


class Labelled(nn.Module):
    """A model that takes the loss itself, as those of Hugging Face can."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.layer, self.reduction = nn.Linear(4, 3), reduction
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> dict[str, Any]:
        logits = self.layer(functional.dropout(self.norm(inputs), 0.2, self.training))
        labels = (inputs[:, 0] > 0).long()
        loss = functional.cross_entropy(logits, labels, reduction=self.reduction)
        return {"loss": loss, "hidden": None}


def zeros() -> nn.Module:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    found, wanted = outputs.softmax(1), functional.one_hot(targets, 3)
    return 1 - 2 * (found * wanted).sum() / (found + wanted).sum()


UNEVEN = torch.tensor([0, -100, 1, 2, 0, 1, 2, 0, 1])
FLOATS = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
EARLY_PADDING = torch.tensor([-100, -100, -100, 1, 2, 0, 1, 2, 0])
MEANS: dict[str, tuple[Loss, nn.Module | None, Tensor | None]] = {
    "function": (functional.cross_entropy, None, None),
    "module": (nn.CrossEntropyLoss(), None, None),
    "class-weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 9.0])), None, None),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), None, None),
    "valid-targets": (nn.CrossEntropyLoss(), None, UNEVEN),
    "first-samples-are-padding": (nn.CrossEntropyLoss(), None, EARLY_PADDING),
    "squares": (nn.MSELoss(), None, FLOATS),
    "divided": (lambda o, t: (o - t).square().sum(1) / len(t), None, FLOATS),
    "dice": (dice, None, None),
    "with-a-count": (lambda o, t: (functional.cross_entropy(o, t), len(t)), None, None),
    "dictionary": (
        lambda o, t: (functional.cross_entropy(o["logits"], t), {"n": len(t)}),
        Outputs(lambda logits, _: {"logits": logits, "other": (logits, None)}),
        None,
    ),
    "alike": (nn.CrossEntropyLoss(), zeros(), None),
    "model-takes-it": (lambda o, _: (o["loss"], {"n": 1}), Labelled("mean"), None),
}


@pytest.mark.parametrize("kind", MEANS)
def test_a_mean_is_refused_with_the_remedy(kind: str) -> None:
    with pytest.raises(
        OwnCodeError, match=r"returns their mean\. Use `reduction=\"sum"
    ):
        rehearsed(*MEANS[kind])


def contrastive(outputs: Tensor, _: Tensor) -> Tensor:
    first, second = outputs.chunk(2, dim=1)
    return functional.cross_entropy(first @ second.T, torch.arange(len(first)))


def triplet(outputs: Tensor, _: Tensor) -> Tensor:
    anchor, near, far = outputs.chunk(3, dim=1)
    return functional.triplet_margin_loss(anchor, near, far, reduction="sum")


def whitened(outputs: Tensor, targets: Tensor) -> Tensor:
    """As in VICReg: depends on the deviation over the batch."""
    spread = (1 - outputs.std(dim=0, correction=0)).relu().mean()
    return spread + functional.mse_loss(outputs, targets)


def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
    dropped = functional.dropout(outputs, 0.5)
    return functional.cross_entropy(dropped, targets, reduction="sum")


class Pair(nn.Module):
    """Fails on a single sample."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) < 2:
            raise ValueError
        return functional.cross_entropy(outputs, targets, reduction="sum")


def measured(loss: Loss) -> Loss:
    return lambda outputs, targets: (loss(outputs, targets), {"n": len(outputs)})


TOTAL = nn.CrossEntropyLoss(reduction="sum")
SUMS: dict[str, tuple[Loss, nn.Module | None, Tensor | None]] = {
    "sum": (TOTAL, None, None),
    "each": (nn.CrossEntropyLoss(reduction="none"), None, None),
    "alike": (TOTAL, zeros(), None),
    "padding": (measured(TOTAL), None, UNEVEN),
    "early-padding": (measured(TOTAL), None, EARLY_PADDING),
    "class-weights": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 9.0]), reduction="sum"),
        None,
        None,
    ),
    "with-a-count": (lambda o, t: (TOTAL(o, t), (t >= 0).sum()), None, UNEVEN),
    "times-the-samples": (lambda o, t: len(t) * dice(o, t), None, None),
    "batch-norm": (TOTAL, nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)), None),
    "contrastive": (measured(contrastive), nn.Linear(4, 6), None),
    "triplet": (measured(triplet), nn.Linear(4, 6), None),
    "whitened": (measured(whitened), None, FLOATS),
    "dropout": (noisy, None, None),
    "fails-on-one": (Pair(), None, None),
    "maximum": (measured(lambda o, _: o.amax()), None, None),
    "no-loss-yet": (measured(lambda o, _: o.sum() * 0), None, None),
    "not-a-number-for-one": (measured(lambda o, _: o.std(dim=0).sum()), None, None),
    "model-takes-it": (lambda o, _: (o["loss"], {"n": 1}), Labelled("sum"), None),
}


@pytest.mark.parametrize("kind", SUMS)
def test_whatever_is_no_mean_is_accepted(kind: str) -> None:
    rehearsed(*SUMS[kind])


def test_a_training_and_a_check_refuse_a_mean(
    train: Train, own: Own, server: ForkServer
) -> None:
    recipe = own("def loss(outputs, y): return functional.cross_entropy(outputs, y)")
    for act in (train, lambda recipe: check_exactness(recipe, server=server)):
        with pytest.raises(OwnCodeError, match=r"mine_.*:loss` returns their mean"):
            act(recipe)
