"""Portable arithmetic for the user's own modules."""

import pytest
import torch
from conftest import Own, Train, fault, small_recipe
from torch import nn

import samestep
from samestep import NotPortable, Placement
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


PORTABLE = {"arithmetic": "portable"}
NORMS = """
def build(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs[0], 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, outputs),
    )
"""
NORMS_SHA256 = "88b63e07d7d1a76df783f7f32bae416023187fb0597358d894775821b8395860"
MANY_UNKNOWN = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, classes)
        self.act = nn.Hardshrink()

    def forward(self, x):
        h = self.act(self.first(x)).cumsum(1)
        if h.sum() > 0:
            h = h * 2
        return self.last(torch.special.i0e(h))

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""


def test_an_own_module_has_one_fingerprint_at_any_placement_and_after_a_kill(
    train: Train, train_under: Train, own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = own(NORMS, **PORTABLE)
    alone = train(recipe, 1)
    assert alone.weights_sha256 == NORMS_SHA256
    kill = [fault("kill", "exchange", 2, rank=1)]
    monkeypatch.setenv(VARIABLE, supported_isas()[-1])
    run = train_under(recipe, kill, 3, exchange="gloo", balance="random")
    assert run.result["restarts"] == 1
    for name in ("weights_sha256", "test_loss"):
        assert run.result[name] == alone.result[name]


def test_a_module_that_is_given_keeps_its_weights(server: ForkServer) -> None:
    torch.manual_seed(1)
    given = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, 10))
    before = given.state_dict()["1.weight"].clone()
    recipe = small_recipe(arithmetic="portable").changed(
        {"model": {"family": "custom", "build": "given:model"}, "optimizer.lr": 1e-9}
    )
    run = samestep.train(
        recipe, Placement(), model=given, view=SilentView(), server=server
    )
    assert torch.allclose(
        run.load_model(given).state_dict()["1.weight"], before, atol=1e-5
    )


def test_all_operations_without_a_kernel_are_named_at_once(
    train: Train, own: Own
) -> None:
    with pytest.raises(NotPortable) as refused:
        train(own(MANY_UNKNOWN, **PORTABLE))
    message = str(refused.value)
    for part in (
        "`aten.hardshrink.default` (module `act`",
        "`aten.cumsum.default` (the model, ",
        "use a product with a triangular matrix",
        "by which the data decide what is computed",
        "`aten.special_i0e.default`",
        "`aten.hardshrink_backward.default` (gradient of module `act`",
    ):
        assert part in message
