"""What `samestep train` takes from a DataLoader, at any number of workers."""

from typing import Any

import pytest
import torch
from conftest import Own, Train, fault
from own_samples import HEAD
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import samestep
from samestep import OwnCodeError, TrainingError
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


LOADERS = (
    HEAD
    + """
from torch.utils.data import (
    BatchSampler, DataLoader, RandomSampler, SubsetRandomSampler, TensorDataset,
    WeightedRandomSampler,
)

class Noisy(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.classes = x, y, [0, 1, 2]
    def __len__(self):
        return len(self.y)
    def __getitem__(self, i):
        return self.x[i] + torch.rand(()), int(self.y[i])

def collate(samples):
    x, y = zip(*samples)
    return torch.stack(x) * 2, torch.tensor(y)

class Uneven(BatchSampler):
    def __iter__(self):
        order = torch.randperm(100).tolist()
        return iter([order[:16], order[16:20], order[20:33]])
    def __len__(self):
        return 3

def load(kind):
    x, y = some()
    plain, noisy = TensorDataset(x, y), Noisy(x, y)
    uneven = Uneven(range(100), 16, False)
    held_out = DataLoader(plain, 10, sampler=SubsetRandomSampler(range(20, 50)))
    chosen = WeightedRandomSampler([1.0, 3.0] * 50, 50)
    if kind == "shuffle":
        return {"train": plain, "validation": held_out}
    train = {
        "loader": lambda: DataLoader(plain, 16, shuffle=True),
        "in order": lambda: DataLoader(plain, 16),
        "drop last": lambda: DataLoader(plain, 16, shuffle=True, drop_last=True),
        "weights": lambda: DataLoader(plain, 16, sampler=chosen),
        "ahead": lambda: DataLoader(
            noisy, 16, sampler=chosen, collate_fn=collate, num_workers=1
        ),
        "batches": lambda: DataLoader(noisy, batch_sampler=uneven),
    }[kind]()
    return {"train": train, "validation": held_out}
"""
)


def recipe_of(own: Own, kind: str, **fields: Any) -> samestep.Recipe:
    given = {"global_batch": 16, "micro_batches": 6, "epochs": 2}
    return own(LOADERS, **given, **{"data.arguments": {"kind": kind}}, **fields)


KINDS = ("in order", "drop last", "weights", "ahead", "batches")


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, own: Own, kind: str
) -> None:
    recipe = recipe_of(own, kind)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "gloo"), (3, "shared")):
        kill = [fault("kill", "forward", 4, rank=1)]
        run = train_under(recipe, kill, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.history[-1]["train_loss"] == alone.history[-1]["train_loss"]
        assert (
            run.history[-1]["validation_loss"] == alone.history[-1]["validation_loss"]
        )


def test_a_loader_that_shuffles_is_its_data_set_in_the_order_of_the_recipe(
    train: Train, own: Own
) -> None:
    for arithmetic in ("torch", "portable"):
        runs = [
            train(recipe_of(own, kind, arithmetic=arithmetic), 2)
            for kind in ("shuffle", "loader")
        ]
        assert runs[0].weights_sha256 == runs[1].weights_sha256


def test_a_loader_with_another_global_batch_than_the_recipe_is_refused(
    train: Train, own: Own
) -> None:
    recipe = recipe_of(own, "loader").changed({"global_batch": 24})
    with pytest.raises(OwnCodeError, match=r"it is 16, and the recipe's.* is 24"):
        train(recipe, 1)
    recipe = recipe_of(own, "batches").changed({"global_batch": 8})
    with pytest.raises(OwnCodeError, match="8; a batch of epoch 0 has 16 samples"):
        train(recipe, 1)


class Alike(torch.nn.Linear):
    """A model of a size that the data decide."""


def build(inputs: tuple[int, ...], outputs: int) -> torch.nn.Module:
    return Alike(inputs[0], outputs)


def test_a_loader_given_in_python_says_the_global_batch(
    server: ForkServer, tmp_path: Any
) -> None:
    samples = TensorDataset(torch.randn(50, 4), torch.arange(50) % 3)
    chosen = WeightedRandomSampler([1.0] * 50, 30)
    loader = DataLoader(samples, batch_size=12, sampler=chosen)
    quietly: dict[str, Any] = {"view": SilentView(), "server": server, "epochs": 1}
    run = samestep.train(model=build, data=loader, out=tmp_path / "a", **quietly)
    assert run.recipe.global_batch == 12
    assert "test_loss" not in run.result
    with pytest.raises(OwnCodeError, match=r"it is 12, and the recipe's.* is 10"):
        samestep.train(
            model=build, data=loader, global_batch=10, out=tmp_path / "b", **quietly
        )


UNSEEDED = LOADERS.replace(
    "torch.randperm(100).tolist()", "np.random.default_rng().permutation(100).tolist()"
)


def test_workers_whose_samplers_differ_are_refused(train: Train, own: Own) -> None:
    recipe = own(UNSEEDED, global_batch=16, **{"data.arguments": {"kind": "batches"}})
    with pytest.raises(TrainingError, match="worker 1 has others than worker 0"):
        train(recipe, 2, probe=False)
