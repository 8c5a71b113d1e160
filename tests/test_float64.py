"""`precision = "float64"`: everything that a training holds, and the same promise."""

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from conftest import Own, Train, small_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_checkpoint import BUILD, same, state_of, write
from torch.nn import functional

from samestep import OwnCodeError, Recipe, RecipeError, report
from samestep.core.plan import derive_seed
from samestep.elastic import state_transfer
from samestep.elastic.node_state import Held
from samestep.state import checkpoint
from samestep.state.fingerprint import fingerprint
from samestep.state.layout import AVERAGE, BEST, Dtype, Entry, Layout
from samestep.user_code.references import UserCode, names


FLOAT64 = {"precision": "float64"}

OWN = """
from torch.utils.checkpoint import checkpoint

def load():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((24, 5))
    return {"train": (x, np.sin(x.sum(1, keepdims=True)))}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 1)

    def inner(self, hidden):
        return torch.tanh(hidden) @ (torch.eye(7) + 0.1)

    def forward(self, x):
        inner = checkpoint(self.inner, self.first(x), use_reentrant=REENTRANT)
        return self.last(inner)

def build():
    return Net()

def loss(outputs, targets):
    error = functional.huber_loss(outputs, targets, reduction="none")
    return (error @ torch.ones(1)).sum(), {"mistake": error.sum()}
"""
"""Its `forward`, once more in the backward pass, and its loss make tensors."""
ONE_STEP = {
    "global_batch": 24,
    "micro_batches": 5,
    "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0},
}


def own_code(reentrant: bool) -> str:
    return OWN.replace("REENTRANT", str(reentrant))


def dtypes(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(path).values()}


def test_everything_on_disk_is_float64_and_a_run_is_read_like_others(
    train: Train, tmp_path: Path
) -> None:
    recipe = small_recipe(model__norm="batch", ema__decay=0.9, **FLOAT64)
    run, plain = train(recipe, 2), train(recipe.changed({"precision": "float32"}))
    (step,) = checkpoint.steps(checkpoint.directory_of(run.path))
    kept = checkpoint.path_of(checkpoint.directory_of(run.path), step)
    numbers = {torch.float64, torch.int64}
    assert dtypes(run.model_file) == dtypes(kept / checkpoint.MODEL) == numbers
    assert dtypes(kept / checkpoint.OPTIMIZER) == {torch.float64}
    model = run.load_model()
    assert fingerprint(model.state_dict()) == run.weights_sha256
    # The same weights in the beginning, order and samples: only rounding differs.
    losses = [each.history[0]["train_loss"] for each in (run, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    page = report.compare([run.path, plain.path], tmp_path / "comparison.html")
    assert all(each.weights_sha256[:12] in page.read_text() for each in (run, plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_gradient_of_a_step_is_that_of_plain_torch_in_float64(
    train: Train, own: Own, reentrant: bool
) -> None:
    recipe = own(own_code(reentrant), **ONE_STEP, **FLOAT64)
    run = train(recipe, 2, exchange="shared")
    parts, places = names(recipe), UserCode([str(Path.cwd())])
    torch.manual_seed(derive_seed(recipe.seed, "model"))
    model = places.find(parts["model"], "model")().double()
    train_split = places.find(parts["data"], "data")()["train"]
    inputs, targets = map(torch.from_numpy, train_split)
    mixing = torch.eye(7, dtype=torch.float64) + 0.1
    outputs = model.last(torch.tanh(model.first(inputs)) @ mixing)
    loss = functional.huber_loss(outputs, targets)
    named, stored = dict(model.named_parameters()), load_file(run.model_file)
    gradients = torch.autograd.grad(loss, list(named.values()))
    for (name, before), gradient in zip(named.items(), gradients, strict=True):
        found = before.detach() - stored[name]
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)


def test_own_code_in_float64_has_one_fingerprint(train: Train, own: Own) -> None:
    recipe = own(own_code(reentrant=False), **FLOAT64)
    alone = train(recipe, 1)
    for workers, exchange in ((2, "shared"), (3, "gloo")):
        run = train(recipe, workers, exchange=exchange, balance="random")
        assert run.weights_sha256 == alone.weights_sha256
        assert run.history[0]["train_loss"] == alone.history[0]["train_loss"]


def test_an_own_model_in_float64_needs_the_switch(train: Train, own: Own) -> None:
    recipe = own("def build(inputs, outputs): return nn.Linear(5, 3).double()")
    with pytest.raises(OwnCodeError, match=r'in float64 with `precision = "float64"`'):
        train(recipe)
    assert train(recipe.changed(FLOAT64)).status == "finished"


def test_gradients_in_float64_are_not_rounded_to_16_bits() -> None:
    with pytest.raises(RecipeError, match="`compression` rounds gradients to 16 bits"):
        small_recipe(compression="bf16", **FLOAT64)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any shapes, with and without the buffers of a best epoch."""
    shapes = st.lists(st.lists(st.integers(0, 40), max_size=3), max_size=4)
    parameters, buffers = draw(shapes), draw(shapes)
    kinds = st.lists(st.sampled_from([BEST, AVERAGE, "exp_avg"]), unique=True)
    return Layout(
        parameters=tuple(
            Entry(name=f"p{n}", shape=tuple(s))
            for n, s in enumerate([[3], *parameters])
        ),
        buffers=tuple(
            Entry(name=f"b{n}", shape=tuple(s)) for n, s in enumerate(buffers)
        ),
        states=tuple(draw(kinds)),
        dtype=draw(st.sampled_from(get_args(Dtype))),
    )


@settings(max_examples=40)
@given(layouts())
def test_a_state_comes_back_from_a_file_and_from_another_machine(
    tmp_path_factory: pytest.TempPathFactory, layout: Layout
) -> None:
    state, recipe = state_of(4, layout), Recipe.load("mnist-mlp")
    where = tmp_path_factory.mktemp("checkpoints")
    found = checkpoint.load(checkpoint.write(where, state, layout, recipe, BUILD, []))
    assert found.manifest.layout == layout
    held = Held(state, layout, recipe, BUILD, [], "")
    arrived = state_transfer._unpack(state_transfer._pack(held))
    for other in (found.state, arrived.state):
        assert same(other, state)
        assert other.parameters.dtype == other.tail.dtype == layout.dtype
    assert arrived.checksum == held.checksum


def test_a_checkpoint_from_before_there_was_float64_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    file = path / checkpoint.MANIFEST
    fields = json.loads(file.read_text())
    del fields["layout"]["dtype"], fields["digest"]
    fields["digest"] = checkpoint.digest_of(fields)
    file.write_text(json.dumps(fields))
    assert same(checkpoint.load(path).state, state_of(3))
