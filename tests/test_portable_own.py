"""Portable arithmetic for the user's own modules."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Own, Train, fault, small_recipe
from module_styles import CLASSES, STYLES
from own_samples import EVERYTHING
from torch import nn

import samestep
from samestep import NotPortable, NotReproducible, Placement, Recipe
from samestep.config.model import CrossEntropy
from samestep.kernels.interface import OpKind
from samestep.kernels.library import VARIABLE, load_kernels, supported_isas
from samestep.kernels.lower import lower
from samestep.kernels.values import (
    LossOp,
)
from samestep.models.device import Device
from samestep.models.objective import Objective
from samestep.output.console import SilentView
from samestep.portable import functions
from samestep.portable.passes import places_of, training_program
from samestep.state.flat import Flat
from samestep.supervisor.forkserver_client import ForkServer
from samestep.training.components import Components, load_and_build
from samestep.user_code import imports
from samestep.user_code.references import UserCode
from samestep.verification import beside_torch
from samestep.verification.beside_torch import BesideTorch


PORTABLE = {"arithmetic": "portable"}
NORMS = """
def build(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs[0], 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, outputs),
    )
"""
NORMS_SHA256 = "88b63e07d7d1a76df783f7f32bae416023187fb0597358d894775821b8395860"
SLOW = """
import time

class Slow(nn.Sequential):
    def forward(self, x):
        time.sleep(0.2)
        return super().forward(x)

def build(inputs, outputs):
    return Slow(nn.Linear(inputs[0], 9), nn.ReLU(), nn.Linear(9, outputs))
"""
MANY_UNKNOWN = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, classes)
        self.act = nn.RReLU()

    def forward(self, x):
        h = torch.special.i1(self.act(self.first(x))).sort(1)[0]
        if h.sum() > 0:
            h = h * 2
        return self.last(torch.special.i0e(h))

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""


REMEMBERS = """
import os

class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.last, self.calls = nn.Linear(width, classes), 0

    def forward(self, x):
        self.calls += 1
        for layer in self.layers[: 1 + self.calls % 3]:
            x = torch.relu(layer(x))
        return self.last(x)

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""


def components_of(recipe: Recipe) -> Components:
    with imports.on_path([str(Path.cwd())]):
        return load_and_build(recipe, UserCode(), None, Device())


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


def test_a_module_is_compared_with_torch_before_a_snapshot_is_loaded(
    train_under: Train, own: Own
) -> None:
    """Weights are in memory that all workers write to, and the leader may be slow."""
    kill = [fault("kill", "exchange", 2, rank=1)]
    run = train_under(own(SLOW, **PORTABLE), kill, 2, exchange="shared")
    assert run.result["restarts"] == 1


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
        "`aten.rrelu_with_noise.default` (module `act`",
        "`aten.special_i1.default` (the model, ",
        "use a pooling or a softmax",
        "by which the data decide what is computed",
        "`aten.special_i0e.default`",
        "`aten.rrelu_with_noise_backward.default` (gradient of module `act`",
    ):
        assert part in message


def test_a_program_that_is_not_the_model_is_refused(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients are compared with PyTorch's, dropout and statistics included."""
    components = components_of(own(NORMS, **PORTABLE))
    flat = components.flat
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    program = training_program(components.objective(), components.data, flat)
    inputs, targets = components.data.splits["train"].gather(torch.arange(20))
    beside = BesideTorch(
        program, components.objective(), flat, vector, load_kernels(), 2**40 + 3
    )
    beside.check(inputs, targets)
    monkeypatch.setattr(beside_torch, "_mix", lambda x: x)  # other dropout
    with pytest.raises(NotPortable, match=r"that of `.*` differs from PyTorch's"):
        beside.check(inputs, targets)


def test_a_program_whose_gradients_are_no_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NaN is neither near to PyTorch's numbers nor far from them."""
    model = torch.nn.Linear(3, 2)
    flat = Flat(model, constant=set())
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    loss = LossOp(OpKind.CROSS_ENTROPY)
    program = lower(model, (3,), places_of(flat), loss)
    beside = BesideTorch(
        program, Objective(model, CrossEntropy()), flat, vector, load_kernels(), 7
    )
    wrong = [torch.full_like(p, torch.nan).double() for p in model.parameters()]
    monkeypatch.setattr(BesideTorch, "recorded", lambda *_: (wrong, []))
    with pytest.raises(NotPortable, match=r"that of `.*` differs from PyTorch's"):
        beside.check(torch.randn(21, 3), torch.randint(2, (21,)))


def test_code_that_remembers_earlier_calls_is_found(train: Train, own: Own) -> None:
    recipe = own(REMEMBERS, **PORTABLE)
    with pytest.raises(NotReproducible, match="computes the same in each call"):
        train(recipe, 2)


def test_code_that_depends_on_its_process_is_found(train: Train, own: Own) -> None:
    code = REMEMBERS.replace("[: 1 + self.calls % 3]", "")
    recipe = own(code.replace("torch.relu(layer(x))", "layer(x) + os.getpid() / 2**22"))
    with pytest.raises(NotReproducible):
        train(recipe.changed(PORTABLE), 3)


def test_branches_by_numbers_that_torch_does_not_draw_are_refused(
    train: Train, own: Own
) -> None:
    code = REMEMBERS.replace("self.calls += 1", "self.calls = random.randrange(9)")
    with pytest.raises(NotPortable, match="random numbers of Python or NumPy"):
        train(own(code, **PORTABLE))


@pytest.mark.parametrize("style", STYLES)
def test_modules_of_many_styles_have_the_gradients_of_torch(style: str) -> None:
    torch.manual_seed(0)
    shape, make = STYLES[style]
    model = make()
    flat = Flat(model, constant={name for name, _ in model.named_buffers()})
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    loss = LossOp(OpKind.CROSS_ENTROPY)
    program = lower(model, shape, places_of(flat), loss)
    beside = BesideTorch(
        program, Objective(model, CrossEntropy()), flat, vector, load_kernels(), 7
    )
    beside.check(torch.randn(21, *shape), torch.randint(CLASSES, (21,)))
    lower(model.eval(), shape, places_of(flat), loss, backward=False)


def test_frozen_and_tied_parameters_and_buffers_stay(train: Train, own: Own) -> None:
    recipe = own(EVERYTHING, global_batch=36, freeze=["last.bias"], **PORTABLE)
    one, several = train(recipe, 1), train(recipe, 3, exchange="gloo")
    assert one.weights_sha256 == several.weights_sha256
    model, start = one.load_model(), components_of(recipe).model
    for name in ("frozen.weight", "last.bias"):
        assert torch.equal(model.get_parameter(name), start.get_parameter(name))
    assert not torch.equal(
        model.state_dict()["last.weight"], start.state_dict()["last.weight"]
    )


POSITIONS = """
class Net(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.last = nn.Linear(width, classes)

    def forward(self, x):
        return self.last(x + torch.cos(torch.arange(x.shape[1]) * 0.7))

def build(inputs, outputs):
    return Net(inputs[0], outputs)
"""


def test_what_a_module_makes_is_portable_or_refused(own: Own) -> None:
    components = components_of(own(POSITIONS, **PORTABLE))
    record = partial(
        training_program, components.objective(), components.data, components.flat
    )
    angles = torch.arange(5) * 0.7
    constants = record().constants
    assert constants is not None
    assert constants.equal(functions.compute("cos", angles))
    components = components_of(own(POSITIONS.replace("cos", "sinh"), **PORTABLE))
    with pytest.raises(NotPortable, match=r"`constants` \(the model, by `aten.sinh"):
        training_program(components.objective(), components.data, components.flat)
