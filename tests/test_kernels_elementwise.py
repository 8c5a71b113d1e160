"""Operations of the kernels beside a plain C reference, bit for bit."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import (
    Made,
    Sample,
    bits,
    check_bits,
    compile_reference,
    operation,
    run_with,
)
from torch.nn import functional

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.library import load_kernels


Maker = Callable[[Sample, int, int], Made]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    return compile_reference(tmp_path_factory.mktemp("reference"))


def make_gather(sample: Sample, features: int, choice: int) -> Made:
    """Bytes of channels, in both layouts or in one; padding is part of the result."""
    channels = 1 + choice % 3
    features *= channels
    rows = torch.randint(256, (7, features), generator=sample.draw, dtype=torch.uint8)
    sample.memory["bytes"] = rows
    chosen = torch.randint(7, (sample.samples,), generator=sample.draw)
    sample.integers("indices", chosen)
    scale = sample.buffer(torch.rand(channels, generator=sample.draw))
    offset = sample.buffer(torch.rand(channels, generator=sample.draw))
    i = [*layouts(sample, features, choice), features, channels, scale, offset]
    return sample, operation(OpKind.GATHER_BYTES, i), {}


def make_load(sample: Sample, features: int, choice: int) -> Made:
    """Floats, in both layouts or in one."""
    sample.floats("inputs", sample.samples, features)
    i = [*layouts(sample, features, choice), features]
    return sample, operation(OpKind.LOAD, i), {}


def layouts(sample: Sample, features: int, choice: int) -> list[int]:
    """Add buffers by feature and by sample, or one of them."""
    panels = -(-features // 32)
    by_feature = sample.buffer(torch.zeros(sample.capacity // 32, features, 32))
    by_sample = sample.buffer(torch.zeros(panels, sample.capacity, 32))
    return [[by_feature, by_sample], [-1, by_sample], [by_feature, -1]][choice // 3 % 3]


def make_activate(sample: Sample, features: int, choice: int) -> Made:
    """ReLU and dropout, either or both."""
    x, y = sample.by_feature(features), sample.by_feature(features)
    op = operation(OpKind.ACTIVATE, [x, y, features, 5], [0.3], choice % 4)
    return sample, op, {x: features, y: features}


def make_gate(sample: Sample, features: int, choice: int) -> Made:
    """The gradient of both."""
    dy, dx, gate = (sample.by_feature(features) for _ in range(3))
    op = operation(OpKind.GATE, [dy, dx, gate, features], [1.25])
    return sample, op, {dy: features, dx: features, gate: features}


def make_store(sample: Sample, features: int, choice: int) -> Made:
    """Outputs as rows."""
    sample.floats("outputs", sample.samples, features)
    x = sample.by_feature(features)
    return sample, operation(OpKind.STORE, [x, features]), {x: features}


def make_norm(sample: Sample, features: int, choice: int) -> Made:
    """BatchNorm, in training and in evaluation, with and without an activation."""
    x, y, z = (sample.by_feature(features) for _ in range(3))
    inverse = sample.buffer(torch.zeros(len(sample.sizes), features))
    i = [x, y, z, inverse, features, 3, 90, 1, 100, 2, 80, 1]
    op = operation(OpKind.BATCH_NORM, i, [1e-5, 0.1, 0.25], choice % 8)
    return sample, op, dict.fromkeys((x, y, z), features)


def make_norm_grad(sample: Sample, features: int, choice: int) -> Made:
    """Its gradients, with and without a gate."""
    dy, dx, y, z = (sample.by_feature(features) for _ in range(4))
    inverses = torch.rand(len(sample.sizes), features, generator=sample.draw)
    inverse = sample.buffer(inverses)
    gate, weight = (y, -1)[choice % 2], (-1, 80)[choice // 2 % 2]
    i = [dy, dx, gate, z, inverse, features, 3, weight, 160]
    op = operation(OpKind.BATCH_NORM_GRAD, i, [1.25])
    return sample, op, dict.fromkeys((dy, dx, y, z), features)


def make_cross_entropy(sample: Sample, features: int, choice: int) -> Made:
    """Labels of classes, mixed, ignored ones, no classes; several positions."""
    scale, positions = (1.0, 60.0, 1e-6)[choice % 3], (1, 3, 0)[choice // 8 % 3]
    rows = features * max(positions, 1)
    x, dx = sample.by_feature(rows, scale), sample.by_feature(rows)
    size = (sample.samples * max(positions, 1),)
    labels = torch.randint(-2, features + 1, size, generator=sample.draw)
    sample.integers("labels", labels)
    for name in ("losses", "metrics"):
        sample.floats(name, *size)
    sample.integers("answers", torch.zeros(size, dtype=torch.int64))
    if choice // 8 % 3 == 2:
        sample.integers("partners", labels.flip(0).clamp(0, features - 1))
        sample.memory["shares"] = torch.rand(sample.samples, generator=sample.draw)
    gradient = (dx, -1, x, dx)[choice % 4]
    op = operation(OpKind.CROSS_ENTROPY, [x, gradient, features, -1, positions])
    op.f[0] = (0.0, 0.1)[choice // 4 % 2]
    return sample, op, {x: rows, dx: rows}


def make_squared_error(sample: Sample, features: int, choice: int) -> Made:
    """Values beside targets."""
    x, dx = sample.by_feature(features), sample.by_feature(features)
    sample.floats("targets", sample.samples, features)
    op = operation(OpKind.SQUARED_ERROR, [x, (dx, -1)[choice % 2], features])
    return sample, op, {x: features, dx: features}


MAKERS = (
    *(make_gather, make_load, make_activate, make_gate, make_store),
    *(make_norm, make_norm_grad, make_cross_entropy, make_squared_error),
)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    ownership=st.tuples(st.integers(0, 5), st.integers(0, 16)),
    features=st.integers(1, 70),
    choice=st.integers(0, 23),
    misalignment=st.integers(0, 15),
    specials=st.sampled_from([0.0, 0.0, 0.02]),
    seed=st.integers(0, 2**32),
)
def test_an_operation_gives_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    make: Maker,
    sizes: list[int],
    ownership: tuple[int, int],
    features: int,
    choice: int,
    misalignment: int,
    specials: float,
    seed: int,
) -> None:
    """With every instruction set: any micro-batches, columns, alignment, numbers."""

    def made() -> Made:
        first, leaves = ownership
        sample = Sample(sizes, first, leaves, seed, misalignment, specials)
        return make(sample, features, choice)

    check_bits(reference.reference_run, made)


@pytest.mark.parametrize("choice", [0, 7])
@pytest.mark.parametrize("make", [make_norm, make_norm_grad])
def test_statistics_of_many_samples_are_sums_of_blocks(
    reference: ctypes.CDLL, make: Maker, choice: int
) -> None:
    """Blocks of 256 samples begin with a micro-batch, wherever its columns begin."""
    check_bits(
        reference.reference_run, lambda: make(Sample([5, 256, 257, 0, 800]), 9, choice)
    )


@pytest.mark.parametrize("features", [255, 256, 257, 512, 1000])
@pytest.mark.parametrize("make", [make_cross_entropy, make_squared_error])
def test_losses_of_many_classes_are_sums_of_blocks(
    reference: ctypes.CDLL, make: Maker, features: int
) -> None:
    """A block has 256 classes or values."""
    check_bits(reference.reference_run, lambda: make(Sample([3, 20]), features, 4))


def rows_of(sample: Sample, number: int, features: int) -> torch.Tensor:
    """Return a buffer by feature as [samples, features]."""
    x = sample.buffers[number].permute(0, 2, 1).reshape(-1, features)
    return x[: sample.samples]


def test_cross_entropy_is_that_of_torch_up_to_rounding() -> None:
    """Losses, gradients, answers; with label smoothing and an ignored label."""
    sample, op, _ = make_cross_entropy(Sample([20, 30]), 10, 4)
    labels = torch.randint(10, (50,), generator=sample.draw)
    labels[7] = -1
    sample.integers("labels", labels)
    logits = rows_of(sample, 0, 10).clone().requires_grad_()
    op.i[1] = 1
    run_with(load_kernels())(op, sample.call())
    losses = functional.cross_entropy(
        logits, labels, ignore_index=-1, label_smoothing=op.f[0], reduction="none"
    )
    (gradient,) = torch.autograd.grad(losses.sum() / 64, logits)
    assert torch.allclose(sample.memory["losses"], losses, atol=1e-6)
    assert torch.allclose(rows_of(sample, 1, 10), gradient, atol=1e-8)
    assert torch.equal(sample.memory["answers"], logits.argmax(1))


def test_batch_norm_is_that_of_torch_up_to_rounding() -> None:
    """Outputs, gradients and running statistics of one micro-batch."""
    sample, op, _ = make_norm(Sample([50]), 12, 0)
    memory = sample.memory
    running = memory["running"].clone()
    run_with(load_kernels())(op, sample.call())
    x = rows_of(sample, 0, 12).clone().requires_grad_()
    weight = memory["parameters"][3:15].clone().requires_grad_()
    bias = memory["parameters"][90:102].clone().requires_grad_()
    mean, variance = running[1:13], running[100:112]
    y = functional.batch_norm(x, mean, variance, weight, bias, training=True)
    assert torch.allclose(rows_of(sample, 1, 12), y, atol=1e-5)
    slot = memory["slot0"][256:]
    assert torch.allclose(slot[2:14], mean, atol=1e-6)
    assert torch.allclose(slot[80:92], variance, atol=1e-6)
    dy = sample.by_feature(12)
    inputs = (x, weight, bias)
    expected = torch.autograd.grad(y, inputs, rows_of(sample, dy, 12))
    i = [dy, 1, -1, 2, 3, 12, 3, 80, 160]
    back = operation(OpKind.BATCH_NORM_GRAD, i, [1.0])
    run_with(load_kernels())(back, sample.call())
    assert torch.allclose(rows_of(sample, 1, 12), expected[0], atol=1e-5)
    assert torch.allclose(memory["slot0"][80:92], expected[1], atol=1e-4)
    assert torch.allclose(memory["slot0"][160:172], expected[2], atol=1e-4)


def test_dropout_depends_on_the_micro_batch_alone() -> None:
    """Its columns, and what lies beside it, change no draw."""
    alone, op, _ = make_activate(Sample([11], seed=1), 40, OpFlag.DROPOUT)
    beside, same, _ = make_activate(Sample([5, 30, 11], seed=2), 40, OpFlag.DROPOUT)
    beside.memory["keys"][2] = alone.memory["keys"][0]
    for sample, one in ((alone, op), (beside, same)):
        sample.buffers[0].fill_(1.0)
        run_with(load_kernels())(one, sample.call())
    expected, found = rows_of(alone, 1, 40), rows_of(beside, 1, 40)[35:]
    assert torch.equal(bits(found.contiguous()), bits(expected.contiguous()))
    assert 0.6 < (expected != 0).double().mean() < 0.8
