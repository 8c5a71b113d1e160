import copy
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from samestep.config.optimizer import (
    AdafactorRecipe,
    AdagradRecipe,
    AdamRecipe,
    AdamWRecipe,
    LambRecipe,
    LionRecipe,
    MuonRecipe,
    OptimizerRecipe,
    ParameterGroup,
    RmspropRecipe,
    ScheduleFreeAdamWRecipe,
    SgdRecipe,
)
from samestep.optim.optimizer import SliceOptimizer, state_names
from samestep.optim.param_groups import slices as group_slices
from samestep.optim.param_groups import unsharded_names
from samestep.state.flat import Flat, block_norms
from samestep.state.layout import BLOCK


OPTIMIZERS: dict[str, OptimizerRecipe] = {
    "sgd": SgdRecipe(lr=0.1, weight_decay=0.01),
    "nesterov": SgdRecipe(lr=0.1, momentum=0.9, nesterov=True),
    "adam": AdamRecipe(lr=0.01, weight_decay=0.1),
    "adamw": AdamWRecipe(lr=0.01, weight_decay=0.1, betas=(0.7, 0.95)),
    "adagrad": AdagradRecipe(
        lr=0.1, weight_decay=0.1, lr_decay=0.01, initial_accumulator_value=0.1
    ),
    "rmsprop": RmspropRecipe(lr=0.01, weight_decay=0.1),
    "rmsprop-centered": RmspropRecipe(lr=0.01, centered=True, momentum=0.9),
}
OWN: dict[str, OptimizerRecipe] = {
    "lion": LionRecipe(lr=0.01, weight_decay=0.1),
    "schedule-free": ScheduleFreeAdamWRecipe(lr=0.01, weight_decay=0.1),
}
"""Optimizers that torch does not have."""


TORCHS: dict[str, Any] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


def trained(recipe: OptimizerRecipe, cuts: list[int], steps: int = 5) -> torch.Tensor:
    """Apply random gradients slice by slice."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(cuts[-1], generator=generator)
    slices = [slice(a, b) for a, b in pairwise(cuts)]
    states = torch.zeros(len(state_names(recipe)), cuts[-1])
    updates = [
        SliceOptimizer(recipe, vector[s], [state[s] for state in states])
        for s in slices
    ]
    for step in range(steps):
        gradient = torch.randn(cuts[-1], generator=generator)
        for s, update in zip(slices, updates, strict=True):
            update.step(gradient[s], recipe.lr / (step + 1))
    return vector


ELEMENTWISE = OPTIMIZERS | OWN


@pytest.mark.parametrize("recipe", ELEMENTWISE.values(), ids=ELEMENTWISE.keys())
def test_a_sliced_update_has_the_bits_of_the_whole_one(recipe: OptimizerRecipe) -> None:
    whole = trained(recipe, [0, 7 * BLOCK])
    assert trained(recipe, [0, BLOCK, 3 * BLOCK, 7 * BLOCK]).equal(whole)
    assert trained(recipe, [BLOCK * i for i in range(8)]).equal(whole)


@pytest.mark.parametrize("recipe", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_update_has_the_bits_of_torch(recipe: OptimizerRecipe) -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(2 * BLOCK, generator=generator))
    ours = {"name", "max_grad_norm", "groups", "decay_norms_and_biases"}
    fields: dict[str, Any] = recipe.model_dump(exclude=ours)
    if recipe.name != "rmsprop":  # the only one without
        fields["fused"] = True
    optimizer = TORCHS[recipe.name]([parameter], **fields)
    for step in range(5):
        parameter.grad = torch.randn(2 * BLOCK, generator=generator)
        optimizer.param_groups[0]["lr"] = recipe.lr / (step + 1)
        optimizer.step()
    assert trained(recipe, [0, 2 * BLOCK]).equal(parameter.data)


def grouped(owned: list[tuple[int, int]]) -> tuple[nn.Module, nn.Module]:
    """Return a model after steps of our groups, slice by slice, and after torch's."""
    recipe = AdamWRecipe(
        lr=0.01,
        weight_decay=0.3,
        decay_norms_and_biases=False,
        groups=(ParameterGroup(match="^1", lr_factor=0.5, weight_decay=0.1),),
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), nn.LayerNorm(16))
    torchs = copy.deepcopy(model)
    flat = Flat(model, state_names(recipe))
    vector, gradient = torch.zeros(flat.size), torch.zeros(flat.size)
    states = torch.zeros(2, flat.size)
    flat.bind(vector, write=True)
    slices = [slice(*part) for part in owned]
    updates = [
        SliceOptimizer(
            recipe,
            vector[part],
            [state[part] for state in states],
            group_slices(recipe, flat.layout, (part.start, part.stop)),
        )
        for part in slices
    ]
    of = dict(torchs.named_parameters())
    first = [of["1.weight"], of["1.bias"]]
    others = [of[name] for name in of if name[0] != "1"]
    optimizer = torch.optim.AdamW(
        [
            {"params": first, "lr": 0.005, "weight_decay": 0.1},
            {"params": [p for p in others if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        fused=True,
    )
    for _ in range(3):
        for parameter, view in zip(of.values(), flat.views(gradient), strict=True):
            parameter.grad = torch.randn(parameter.shape)
            view.copy_(parameter.grad)
        optimizer.step()
        for part, update in zip(slices, updates, strict=True):
            update.step(gradient[part], 0.01)
    return model, torchs


@pytest.mark.parametrize("cuts", [[0, 3072], [0, 1024, 3072], [0, 1024, 2048, 3072]])
def test_groups_have_the_bits_of_torch_however_the_vector_is_cut(
    cuts: list[int],
) -> None:
    ours, torchs = grouped(list(pairwise(cuts)))
    assert all(map(torch.equal, ours.parameters(), torchs.parameters()))


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
def test_muon_has_the_bits_of_torch_however_many_workers_share_it(
    workers: int, adjust_lr: Literal["original", "match_rms_adamw"]
) -> None:
    recipe = MuonRecipe(lr=0.02, weight_decay=0.1, adamw_lr=0.01, adjust_lr=adjust_lr)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(3)), nn.Linear(48, 112))
    torchs = copy.deepcopy(model)
    of = dict(torchs.named_parameters())
    whole = unsharded_names(recipe, {name: p.shape for name, p in of.items()})
    assert whole == ("1.weight", "2.weight")
    flat = Flat(model, state_names(recipe), unsharded=whole)
    vector, gradient = torch.zeros(2, flat.size)
    states = torch.zeros(2, flat.size)
    flat.bind(vector, write=True)
    slices = [slice(*part) for part in flat.layout.slices(workers)]
    updates = [
        SliceOptimizer(
            recipe,
            vector[part],
            [state[part] for state in states],
            group_slices(recipe, flat.layout, (part.start, part.stop)),
        )
        for part in slices
    ]
    optimizers = [
        torch.optim.Muon(
            [of[name] for name in whole], 0.02, 0.1, 0.95, adjust_lr_fn=adjust_lr
        ),
        torch.optim.AdamW(
            [of[name] for name in of if name not in whole],
            0.01,
            weight_decay=0.1,
            fused=True,
        ),
    ]
    for _ in range(3):
        for parameter, view in zip(of.values(), flat.views(gradient), strict=True):
            parameter.grad = torch.randn(parameter.shape)
            view.copy_(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
        for part, update in zip(slices, updates, strict=True):
            update.step(gradient[part], 0.02)
    assert all(map(torch.equal, model.parameters(), torchs.parameters()))


def updated(recipe: OptimizerRecipe, model: nn.Module, workers: int) -> list[Any]:
    """Take steps of an optimizer of whole parameters, and return all gradients."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    whole = unsharded_names(recipe, shapes)
    assert whole == tuple(shapes)
    flat = Flat(model, state_names(recipe), unsharded=whole)
    vector, gradient, *states = torch.zeros(4, flat.size)
    flat.bind(vector, write=True)
    slices = [slice(*part) for part in flat.layout.slices(workers)]
    updates = [
        SliceOptimizer(
            recipe,
            vector[part],
            [state[part] for state in states],
            group_slices(recipe, flat.layout, (part.start, part.stop)),
        )
        for part in slices
    ]
    draw = torch.Generator().manual_seed(0)
    all_gradients = []
    for step in range(4):
        gradients = [torch.randn(shape, generator=draw) for shape in shapes.values()]
        for value, view in zip(gradients, flat.views(gradient), strict=True):
            view.copy_(value)
        for part, update in zip(slices, updates, strict=True):
            update.step(gradient[part], recipe.lr / (step + 1))
        all_gradients.append(gradients)
    return all_gradients


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(8, 24, 3), nn.Linear(48, 31), nn.Linear(31, 1), nn.LayerNorm(1)
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_adafactor_has_the_bits_of_torch_however_many_workers_share_it(
    workers: int,
) -> None:
    recipe = AdafactorRecipe(lr=0.3, weight_decay=0.1, d=1.5)
    model, torchs = layers(), layers()
    optimizer: Any = torch.optim.Adafactor(
        torchs.parameters(), lr=0.3, weight_decay=0.1, d=1.5, foreach=False
    )
    for step, gradients in enumerate(updated(recipe, model, workers)):
        for parameter, gradient in zip(torchs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), torchs.parameters()))


def lamb(weights: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Follow Algorithm 2 of the paper in float64."""
    w, m, v = weights.double(), torch.tensor(0.0), torch.tensor(0.0)
    for t, g in enumerate(gradients, start=1):
        lr = 0.05 / t
        m, v = 0.9 * m + 0.1 * g.double(), 0.999 * v + 0.001 * g.double() ** 2
        r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + 0.1 * w
        ratio = w.norm() / r.norm() if w.norm() else 1.0
        w = w - lr * ratio * r
    return w


@pytest.mark.parametrize("workers", [1, 3])
def test_lamb_follows_its_paper_however_many_workers_share_it(workers: int) -> None:
    model, alone = layers(), layers()
    with torch.no_grad():
        [*model.parameters()][-1].zero_()
    before = [p.detach().clone() for p in model.parameters()]
    recipe = LambRecipe(lr=0.05, weight_decay=0.1)
    gradients = updated(recipe, model, workers)
    updated(recipe, alone, 1)
    assert all(map(torch.equal, model.parameters(), alone.parameters()))
    for index, (old, new) in enumerate(zip(before, model.parameters(), strict=True)):
        exact = lamb(old, [step[index] for step in gradients])
        torch.testing.assert_close(new.double(), exact, rtol=1e-5, atol=1e-6)


def lion(x: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Follow Algorithm 2 of the paper in float64."""
    m = torch.zeros_like(x)
    for step, g in enumerate(gradients):
        lr = 0.01 / (step + 1)
        x = x - lr * ((0.9 * m + 0.1 * g).sign() + 0.1 * x)
        m = 0.99 * m + 0.01 * g
    return x


def schedule_free(x: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Follow Algorithm 1 of the paper in float64; return where gradients are taken."""
    z, y, v, squares = x, x, torch.zeros_like(x), 0.0
    for t, g in enumerate(gradients, start=1):
        lr = 0.01 / t
        squares += lr**2
        v = 0.999 * v + 0.001 * g**2
        z = z - lr * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + 0.1 * y)
        c = lr**2 / squares
        x = (1 - c) * x + c * z
        y = 0.1 * z + 0.9 * x
    return y


@pytest.mark.parametrize("name", OWN)
def test_an_optimizer_that_torch_lacks_follows_its_paper(name: str) -> None:
    follow = {"lion": lion, "schedule-free": schedule_free}[name]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(BLOCK, generator=generator).double() for _ in range(6)]
    ours = trained(OWN[name], [0, BLOCK]).double()
    exact = follow(values[0], values[1:])
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(1, 99), min_size=3, max_size=6), st.integers(1, 12))
def test_whole_matrices_are_never_cut(widths: list[int], workers: int) -> None:
    model = nn.Sequential(*(nn.Linear(*ends) for ends in pairwise(widths)))
    names = [f"{index}.weight" for index in range(len(widths) - 1)]
    layout = Flat(model, unsharded=names).layout
    slices = layout.slices(workers)
    assert [s[0] for s in slices[1:]] == [s[1] for s in slices[:-1]]
    assert (slices[0][0], slices[-1][1]) == (0, layout.size)
    starts = dict(
        zip((e.name for e in layout.parameters), layout.offsets, strict=False)
    )
    ends = dict(zip(starts, layout.offsets[1:], strict=True))
    cuts = {cut for part in slices for cut in part}
    assert not any(starts[n] < cut < ends[n] for n in names for cut in cuts)


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_the_norm_of_a_block_does_not_depend_on_who_computes_it(
    blocks: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(blocks * BLOCK, generator=generator)
    alone = [block_norms(block) for block in torch.split(vector, BLOCK)]
    assert block_norms(vector).equal(torch.cat(alone))


@given(st.integers(1, 3000), st.integers(1, 9))
def test_slices_cover_the_vector_at_block_boundaries(width: int, workers: int) -> None:
    flat = Flat(nn.Linear(width, 3))
    slices = flat.layout.slices(workers)
    assert [s[0] for s in slices[1:]] == [s[1] for s in slices[:-1]]
    assert (slices[0][0], slices[-1][1]) == (0, flat.size)
    assert all(cut % BLOCK == 0 for s in slices for cut in s)


def test_a_bound_model_reads_and_writes_the_vector() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    flat = Flat(model)
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    assert all(map(torch.equal, model.parameters(), before))
    vector.zero_()
    assert not any(parameter.any() for parameter in model.parameters())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert all((a - addresses[0]) % 64 == 0 for a in addresses)


def test_buffers_advance_to_the_mean_over_micro_batches() -> None:
    model = nn.BatchNorm1d(2)
    flat = Flat(model)
    total = torch.zeros(flat.tail)
    for scale in (1.0, 3.0):
        flat.restore_buffers()
        model(torch.tensor([[0.0, 0.0], [2 * scale, 4 * scale]]))
        total += flat.read_buffers()
    flat.advance_buffers(total, micro_batches=2, updates=2)
    assert model.running_mean is not None
    assert model.num_batches_tracked is not None
    assert model.running_mean.tolist() == pytest.approx([0.2, 0.4])
    assert model.num_batches_tracked.item() == 2
