"""Operations that modules of users have, with portable arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Own, Train
from module_operations import OPERATIONS
from module_styles import CLASSES, Called
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samestep import NotPortable
from samestep.config.model import CrossEntropy
from samestep.kernels.interface import OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.values import LossOp
from samestep.models.objective import Objective
from samestep.portable.passes import places_of
from samestep.state.flat import Flat
from samestep.verification.beside_torch import BesideTorch


LOSS = LossOp(OpKind.CROSS_ENTROPY)
NOISE = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.mean, self.spread = nn.Linear(width, 4), nn.Linear(width, 4)
        self.last = nn.Linear(4, classes)

    def forward(self, x):
        mean, spread = self.mean(x), functional.softplus(self.spread(x))
        z = mean + spread * torch.randn_like(mean)
        return self.last(functional.dropout(z, 0.1) * torch.rand(len(x), 1))

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""
NOISE_SHA256 = "ed9a4d00b9fe197bfa7826e8da18d74048293ebaa066eea5e5417fddc60a2371"


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_have_the_gradients_of_torch(name: str) -> None:
    torch.manual_seed(0)
    shape, make = OPERATIONS[name]
    model = make()
    flat = Flat(model, constant={name for name, _ in model.named_buffers()})
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    program = lower(model, shape, places_of(flat), LOSS)
    objective = Objective(model, CrossEntropy())
    beside = BesideTorch(program, objective, flat, vector, load_kernels(), 2**40 + 7)
    beside.check(torch.randn(21, *shape), torch.randint(CLASSES, (21,)))
    lower(model.eval(), shape, places_of(flat), LOSS, backward=False)


def test_draws_have_one_fingerprint_and_do_not_depend_on_batches(
    train: Train, own: Own
) -> None:
    """A sample's numbers are its own, in evaluation, too, where it draws as torch."""
    recipe = own(NOISE, arithmetic="portable")
    alone = train(recipe, 1)
    assert alone.weights_sha256 == NOISE_SHA256
    for workers, batch in ((2, 7), (3, 1)):
        run = train(recipe.changed({"evaluation_batch": batch}), workers)
        for name in ("weights_sha256", "test_loss"):
            assert run.result[name] == alone.result[name]
    without = own(NOISE.replace("torch.randn_like(mean)", "0"), arithmetic="portable")
    assert train(without, 1).result["test_loss"] != alone.result["test_loss"]


def _checkpointed(layer: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(checkpoint(layer, x, use_reentrant=True))


def _in_place(layer: Any, x: Tensor) -> Tensor:
    view = layer(x).view(-1, CLASSES, 1).transpose(1, 2)
    view += torch.arange(5.0)
    return torch.as_tensor(view.flatten(1))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (_checkpointed, "set `use_reentrant=False`"),
        (_in_place, r"use `x = x \+ y` where a view"),
    ],
)
def test_reentrant_checkpoints_and_views_that_change_in_place_are_refused(
    forward: Callable[[Any, Tensor], Tensor], message: str
) -> None:
    model = Called(
        lambda m, x: forward(m.a, x + m.b),
        a=nn.Linear(5, CLASSES),
        b=nn.Parameter(torch.randn(5)),
    )
    with pytest.raises(NotPortable, match=message):
        lower(model, (5,), places_of(Flat(model)), LOSS)


@pytest.mark.parametrize("is_last", [True, False])
def test_numbers_that_are_not_of_samples_are_refused(is_last: bool) -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(5, len(x)).T if is_last else torch.randn(5)
            return super().forward(x + noise)

    model = Noisy(5, 3)
    with pytest.raises(NotPortable, match=r"`aten.randn.default`.*the first dimension"):
        lower(model, (5,), places_of(Flat(model)), LOSS)
