"""From a module to a program: recording, lowering, fusion, places, gradients."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_styles import STYLES
from torch import Tensor, nn

from samestep import NotPortable
from samestep.config.model import MlpModel
from samestep.core import tree
from samestep.data.dataset import Dataset
from samestep.kernels import fusion
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.program import Op, Program, places
from samestep.kernels.values import (
    LossOp,
)
from samestep.models.mlp import Mlp
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


LOSS = LossOp(OpKind.CROSS_ENTROPY, smoothing=0.1)
FEATURES, CLASSES = 20, 5


def program_of(model: nn.Module, backward: bool = True) -> Program:
    return lower(model, (FEATURES,), places_of(Flat(model)), LOSS, backward)


def kinds(program: Program) -> list[str]:
    return [op.kind.name for op in program.ops]


def perceptron(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 7), *between, nn.Linear(7, CLASSES))


def test_a_built_in_perceptron_becomes_few_operations() -> None:
    model = Mlp(
        MlpModel(hidden=(9, 8), dropout=0.2),
        Dataset((FEATURES,), CLASSES, "classification"),
    )
    assert kinds(program_of(model)) == [
        *("LOAD", "LINEAR", "LINEAR", "LINEAR", "CROSS_ENTROPY"),
        *("LINEAR_GRAD_INPUT", "GRAD_BIAS", "TRANSPOSE", "LINEAR_GRAD_WEIGHT"),
        *("LINEAR_GRAD_INPUT", "GRAD_BIAS", "TRANSPOSE", "LINEAR_GRAD_WEIGHT"),
        *("GRAD_BIAS", "LINEAR_GRAD_WEIGHT"),
    ]


def test_evaluation_needs_no_gradient_and_no_dropout() -> None:
    model = perceptron(nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.5)).eval()
    program = program_of(model, backward=False)
    assert kinds(program) == [
        *("LOAD", "LINEAR", "BATCH_NORM", "LINEAR", "CROSS_ENTROPY")
    ]
    assert not program.has_draws


def test_recording_changes_no_statistics() -> None:
    model = perceptron(nn.BatchNorm1d(7))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    program_of(model)
    assert all(value.equal(before[n]) for n, value in model.state_dict().items())


def test_all_operations_without_a_kernel_are_named_with_their_modules() -> None:
    model = perceptron(nn.RReLU(), nn.Linear(7, 7), nn.RReLU())
    with pytest.raises(
        NotPortable, match=r"rrelu_with_noise.default` \(module `1`.*; module `3`"
    ):
        program_of(model)


class Branching(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.sum().item() > 0 else -inputs


def test_a_branch_that_depends_on_the_data_is_refused() -> None:
    with pytest.raises(NotPortable, match="module `1`"):
        program_of(perceptron(Branching()))


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 9))
def test_buffers_that_are_in_use_together_never_overlap(
    depth: int, samples: int, micro_batches: int
) -> None:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(7, 7), nn.ReLU())]
    program = program_of(perceptron(*hidden))
    capacity = -(-samples // 32) * 32
    *starts, size = places(program, capacity, micro_batches)
    alive: dict[int, set[int]] = {}
    for number, op in enumerate(program.ops):
        for buffer in (*op.reads, *op.writes):
            alive.setdefault(buffer, set()).update((number,))
    spans = {
        b: (
            starts[b],
            starts[b] + 4 * program.buffers[b].size(capacity, micro_batches),
            min(used),
            max(used),
        )
        for b, used in alive.items()
    }
    for a, (first, end, born, dies) in spans.items():
        assert end <= size
        for b, (other, other_end, later, last) in spans.items():
            if a < b and born <= last and later <= dies:
                assert end <= other or other_end <= first


class Searched(fusion.Graph):
    """Looks at all operations instead of what was noted of them."""

    def writer(self, buffer: int) -> Op:
        return next(op for op in self.ops if buffer in op.writes)

    def readers(self, buffer: int) -> list[Op]:
        return [op for op in self.ops if buffer in op.reads]


@pytest.mark.parametrize("style", STYLES)
def test_operations_are_joined_by_the_buffers_that_they_have_now(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, make = STYLES[style]
    model = make()
    constant = {name for name, _ in model.named_buffers()}
    where = places_of(Flat(model, constant=constant))
    program = lower(model, shape, where, LOSS)
    monkeypatch.setattr(fusion, "Graph", Searched)
    assert lower(model, shape, where, LOSS).ops == program.ops


class Looped(nn.Module):
    """One layer, several times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(FEATURES, FEATURES), times

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(self.times):
            inputs = torch.relu(self.layer(inputs)) + inputs
        return inputs


def test_a_program_is_made_by_as_many_looks_as_it_has_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks, reads = [], Op.reads

    def counted(op: Op) -> list[int]:
        looks.append(op)
        return list(reads.__get__(op))

    monkeypatch.setattr(Op, "reads", property(counted))
    counts = []
    for times in (20, 40):
        looks.clear()
        places(program_of(Looped(times)), 32, 1)
        counts.append(len(looks))
    assert counts[1] < 2.2 * counts[0]


def test_bound_slots_are_kept_alive() -> None:
    execution = Execution(program_of(perceptron()), load_kernels(), 1, 1)
    slot = torch.zeros(1)
    alive = weakref.ref(slot)
    execution.bind_slots([slot], 1)
    del slot
    assert alive() is not None


def gradients(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    sizes: Sequence[int],
    weight: float,
) -> list[Tensor]:
    """Return the gradients of micro-batches of these sizes, computed by kernels."""
    flat = Flat(model)
    vector, slot = torch.zeros(flat.size), torch.zeros(flat.size + flat.tail)
    flat.bind(vector, write=True)
    count = len(sizes)
    execution = Execution(program_of(model), load_kernels(), len(inputs), count)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    merges = [tree.num_merges(m, (0, count), count) for m in range(count)]
    execution.bind_micro_batches(starts, torch.tensor(merges))
    execution.bind_slots([slot], flat.size)
    execution.bind(parameters=vector, running=flat.saved_buffers(), inputs=inputs)
    execution.labels[: len(labels)] = labels.numpy()
    execution.call.weight = weight
    execution.run()
    return flat.views(slot)


@pytest.mark.parametrize("sizes", [[32, 32], [7, 9, 40, 4], [300], [5] * 13])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_are_those_of_float64(norm: bool, sizes: list[int]) -> None:
    torch.manual_seed(1)
    model = perceptron(*([nn.BatchNorm1d(7)] if norm else []), nn.ReLU())
    inputs = torch.randn(sum(sizes), FEATURES)
    labels = torch.randint(CLASSES, (len(inputs),))
    exact = perceptron(*([nn.BatchNorm1d(7)] if norm else []), nn.ReLU()).double()
    exact.load_state_dict(model.state_dict())
    parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
    losses = [
        nn.functional.cross_entropy(
            exact(x.double()), y, reduction="sum", label_smoothing=0.1
        )
        for x, y in parts
    ]
    loss = torch.stack(losses).sum() / len(labels)
    expected = torch.autograd.grad(loss, list(exact.parameters()))
    found = gradients(model, inputs, labels, sizes, weight=1 / len(labels))
    for gradient, reference in zip(found, expected, strict=True):
        error = (gradient - reference).norm()
        assert error <= 1e-5 * reference.norm() + 1e-7


@settings(max_examples=20)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(any))
def test_computing_micro_batches_together_changes_no_bit(sizes: list[int]) -> None:
    """A power of two divides the losses, so that it changes no bit either."""
    torch.manual_seed(1)
    model = perceptron(nn.ReLU())
    inputs = torch.randn(sum(sizes), FEATURES)
    labels = torch.randint(CLASSES, (len(inputs),))
    together = gradients(model, inputs, labels, sizes, weight=1 / 64)
    parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
    alone = {
        (m, m + 1): gradients(model, x, y, [len(x)], weight=1 / 64)
        for m, (x, y) in enumerate(parts)
    }
    total = tree.reduce(
        len(sizes), alone, lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
    )
    assert all(map(torch.equal, together, total))


def test_dropout_without_an_activation_drops_the_gradient_likewise() -> None:
    """The weight after it has no gradient from what was dropped: a mask is shared."""
    torch.manual_seed(1)
    first = nn.Linear(FEATURES, 7)
    with torch.no_grad():
        first.weight.zero_()  # every hidden value is its bias
        first.bias.fill_(1.0)
    model = nn.Sequential(first, nn.Dropout(0.5), nn.Linear(7, CLASSES))
    inputs, labels = torch.randn(1, FEATURES), torch.randint(CLASSES, (1,))
    _, bias, last, _ = gradients(model, inputs, labels, [1], weight=1.0)
    dropped = last.abs().sum(0) == 0
    assert 0 < dropped.sum() < 7
    assert torch.equal(dropped, bias == 0)
