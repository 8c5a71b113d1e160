"""Pooling and BatchNorm of images beside a plain C reference, bit for bit."""

import ctypes
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import (
    Made,
    Sample,
    check_bits,
    compile_reference,
    operation,
)

from samestep.kernels.interface import OpFlag, OpKind


Maker = Callable[[Sample, int, int], Made]
PLANES = 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    return compile_reference(tmp_path_factory.mktemp("reference"), "reference_images.c")


def axis(sample: Sample, choice: int) -> list[int]:
    """Draw the windows of one axis: tiling, overlapping, apart, padded or adaptive."""

    def below(end: int) -> int:
        return int(torch.randint(end, (), generator=sample.draw))

    size, kernel = 1 + below(9), 2 + choice % 2
    if choice % 5 == 0:
        return [2 * size, size, 2, 2, 0, 1]
    if choice % 5 == 1:
        return [size, 1 + below(12), 0, 0, 0, 1]
    dilation = 1 + below(2) * below(2)
    size += dilation * (kernel - 1)
    padding, stride = below(kernel // 2 + 1), 1 + below(4)
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    return [size, 1 + reach // stride, kernel, stride, padding, dilation]


def make_pool(sample: Sample, pick: int, choice: int) -> Made:
    """Any pooling of images, or its gradient."""
    kind = OpKind(OpKind.MAX_POOL + pick % 4)
    y, x = axis(sample, choice), axis(sample, choice // 5)
    pixels, out = PLANES * y[0] * x[0], PLANES * y[1] * x[1]
    is_grad = kind in (OpKind.MAX_POOL_GRAD, OpKind.MEAN_POOL_GRAD)
    sizes = [out, pixels] if is_grad else [pixels, out]
    first, second = (sample.by_feature(size) for size in sizes)
    where = sample.by_feature(out)
    shape = sample.buffers[where].shape
    chosen = torch.randint(-1, y[0] * x[0], shape, generator=sample.draw)
    sample.buffers[where].copy_(chosen.int().view(torch.float32))
    sample.buffers[0].copy_(sample.buffers[0].mul(2).round())  # equal values, too
    i = [first, second, where, PLANES, *y, *x, (0, -1, 7)[choice % 3]]
    if kind == OpKind.MAX_POOL and choice % 4 == 3:
        i[2] = -1
    op = operation(kind, i, flags=(choice % 2) * OpFlag.RELU)
    return sample, op, {first: sizes[0], second: sizes[1], where: out}


def make_norm(sample: Sample, pixels: int, choice: int) -> Made:
    """BatchNorm in training and in evaluation; with and without all its parts."""
    size = PLANES * pixels
    x, y, added = (sample.by_feature(size) for _ in range(3))
    means, inverses = (sample.by_feature(PLANES) for _ in range(2))
    is_eval = choice % 3 == 0
    running = [10, 20] if is_eval or choice % 2 else [-1, -1]
    offsets = [30, 40] if choice // 3 % 4 else [-1, -1]
    i = [x, y, means, inverses, PLANES, pixels, *offsets, *running]
    i += [added if choice // 2 % 2 else -1]
    flags = (OpFlag.EVAL if is_eval else 0) | (choice // 6 % 2) * OpFlag.RELU
    op = operation(OpKind.BATCH_NORM_2D, i, [1e-5, 0.1], flags)
    return sample, op, _sizes([x, y, added], size) | _sizes([means, inverses], PLANES)


def make_norm_grad(sample: Sample, pixels: int, choice: int) -> Made:
    """Its gradients, with a gate, one that is computed anew, or without."""
    size = PLANES * pixels
    dy, dx, y, x = (sample.by_feature(size) for _ in range(4))
    means, inverses = (sample.by_feature(PLANES) for _ in range(2))
    room = sample.workspace(sample.capacity * PLANES * 2)
    i = [dy, dx, y if choice % 3 == 0 else -1, x, means, inverses, room, PLANES, pixels]
    i += [30, 40, 50, 60] if choice // 3 % 4 else [-1, -1, -1, -1]
    flags = OpFlag.RELU if choice % 3 == 1 else 0
    op = operation(OpKind.BATCH_NORM_2D_GRAD, i, flags=flags)
    return sample, op, _sizes([dy, dx, y, x], size) | _sizes([means, inverses], PLANES)


def _sizes(buffers: Sequence[int], size: int) -> dict[int, int]:
    return dict.fromkeys(buffers, size)


@pytest.mark.parametrize("make", [make_pool, make_norm, make_norm_grad])
@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    ownership=st.tuples(st.integers(0, 5), st.integers(0, 16)),
    number=st.integers(1, 40),
    choice=st.integers(0, 59),
    misalignment=st.integers(0, 15),
    specials=st.sampled_from([0.0, 0.0, 0.02]),
    seed=st.integers(0, 2**32),
)
def test_images_have_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    make: Maker,
    sizes: list[int],
    ownership: tuple[int, int],
    number: int,
    choice: int,
    misalignment: int,
    specials: float,
    seed: int,
) -> None:
    """With every instruction set: any micro-batches, windows, alignment, numbers."""

    def made() -> Made:
        first, leaves = ownership
        sample = Sample(sizes, first, leaves, seed, misalignment, specials)
        return make(sample, number, choice)

    check_bits(reference.reference_images, made)


@pytest.mark.parametrize("pixels", [255, 256, 257, 600])
@pytest.mark.parametrize("make", [make_norm, make_norm_grad])
def test_statistics_of_many_pixels_are_sums_of_blocks(
    reference: ctypes.CDLL, make: Maker, pixels: int
) -> None:
    """A block has 256 pixels of a sample, and 256 samples of a micro-batch."""
    check_bits(reference.reference_images, lambda: make(Sample([3, 20, 0]), pixels, 1))
    check_bits(
        reference.reference_images, lambda: make(Sample([257, 5]), pixels % 5 + 1, 1)
    )
