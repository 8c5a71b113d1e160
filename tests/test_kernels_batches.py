"""A recording is of batches of any size, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_styles import Called
from torch import Tensor, nn

from samestep.config.model import CrossEntropy
from samestep.errors import NotPortable
from samestep.kernels.interface import OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.program import Program
from samestep.kernels.values import LossOp
from samestep.models.objective import Objective
from samestep.portable.passes import places_of
from samestep.state.flat import Flat
from samestep.verification.beside_torch import BesideTorch


WIDTH, CLASSES = 6, 5


def model_of(forward: Callable[[Any, Tensor], Tensor], width: int = WIDTH) -> nn.Module:
    """Return a model that maps [b, width] by a function, then by a layer `last`."""
    torch.manual_seed(0)
    return Called(forward, last=nn.Linear(width, CLASSES))


def program_of(model: nn.Module, width: int = WIDTH) -> Program:
    loss = LossOp(OpKind.CROSS_ENTROPY)
    return lower(model, (width,), places_of(Flat(model)), loss)


def check_beside_torch(model: nn.Module, width: int) -> None:
    """Check the gradients of 21 samples."""
    flat = Flat(model)
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    objective = Objective(model, CrossEntropy())
    program = program_of(model, width)
    beside = BesideTorch(program, objective, flat, vector, load_kernels(), 7)
    beside.check(torch.randn(21, width), torch.randint(CLASSES, (21,)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.last(x * (1 / len(x))),
        lambda m, x: m.last(x * torch.tensor(1 / len(x))),
        lambda m, x: m.last(torch.cat([x[1:], x[:1]])),
        lambda m, x: m.last(x if len(x) > 2 else x.relu()),
    ],
)
def test_what_computes_with_the_number_of_samples_is_refused(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    with pytest.raises(NotPortable, match="computes with the number of samples"):
        program_of(model_of(forward))


def test_elements_of_a_mask_may_be_counted_to_see_whether_it_masks() -> None:
    def forward(model: Any, x: Tensor, least: int = 0) -> Tensor:
        mask = torch.ones(len(x), WIDTH, dtype=torch.int64)
        count = mask.sum()
        if count == least if least else count == mask.numel():
            return torch.as_tensor(model.last(x))
        return torch.as_tensor(model.last(x * mask))

    check_beside_torch(model_of(forward), WIDTH)
    with pytest.raises(NotPortable, match=r"number of samples in `aten.eq.Scalar`"):
        program_of(model_of(lambda m, x: forward(m, x, least=1000)))


def test_constants_without_elements_may_have_samples() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = x + torch.zeros(len(x), 0).sum(1, keepdim=True)
        return torch.as_tensor(model.last(torch.cat([torch.tensor([]), x], -1)))

    check_beside_torch(model_of(forward), WIDTH)


def test_a_division_by_the_number_of_samples_is_found() -> None:
    with pytest.raises(NotPortable, match="differs from PyTorch's"):
        check_beside_torch(model_of(lambda m, x: m.last(x / len(x))), WIDTH)


def test_constants_that_nothing_uses_may_depend_on_the_number_of_samples() -> None:
    def forward(model: Any, x: Tensor, is_used: bool = False) -> Tensor:
        backwards = torch.arange(len(x), 0, -1)
        factor = backwards if is_used else torch.arange(2, 3)
        out: Tensor = model.last(x * factor[:, None])
        return out

    check_beside_torch(model_of(forward), WIDTH)
    with pytest.raises(NotPortable, match=r"no kernels for.*\n- `aten\.mul\.Tensor`"):
        program_of(model_of(lambda m, x: forward(m, x, is_used=True)))


@pytest.mark.parametrize(
    "index",
    [
        lambda x: torch.tensor([4, 0, 2]).expand(len(x), 3),
        lambda x: torch.tensor([4, 0, 2])[None].repeat(len(x), 1),
    ],
)
def test_indices_that_all_samples_have_are_constants(
    index: Callable[[Tensor], Tensor],
) -> None:
    check_beside_torch(model_of(lambda m, x: m.last(x.gather(1, index(x))), 3), 3 + 2)


def test_rows_of_samples_may_be_chosen_from_all_rows() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        rows = torch.arange(len(x)).repeat_interleave(2) * 3 + torch.tensor(
            [2, 0]
        ).repeat(len(x))
        parts = x.view(-1, 2).index_select(0, rows)
        out: Tensor = model.last(parts.view(len(x), 4))
        return out

    check_beside_torch(model_of(forward, 4), WIDTH)


def test_a_dimension_of_any_size_is_not_taken_for_that_of_the_samples() -> None:
    width = 60

    def forward(model: Any, x: Tensor) -> Tensor:
        parts = [torch.cat([x, x[:, :n]], 1).relu() for n in range(1, WIDTH + 1)]
        out: Tensor = model.last(torch.cat([p.mean(1, True) for p in parts], 1))
        return out

    check_beside_torch(model_of(forward), width)


def test_what_a_first_call_makes_for_later_ones_is_a_constant() -> None:
    def cached(model: Any, x: Tensor) -> Tensor:
        if not hasattr(model, "table"):
            model.table = torch.arange(WIDTH) / WIDTH
        out: Tensor = model.last(x + model.table)
        return out

    plain = program_of(model_of(lambda m, x: m.last(x + torch.arange(WIDTH) / WIDTH)))
    assert program_of(model_of(cached)).sha256 == plain.sha256


def test_states_of_any_number_of_samples_may_be_made() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        state = torch.zeros(len(x), CLASSES)
        for step in range(3):
            state = torch.tanh(model.last(x[:, step : step + WIDTH]) + state)
        return state

    check_beside_torch(model_of(forward), WIDTH + 2)
