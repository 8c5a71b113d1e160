"""Layers at positions and functions of rows beside a plain C reference, bit for bit."""

import ctypes
import math
from collections.abc import Callable

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

from samestep.kernels.interface import Binary, OpFlag, OpKind, Unary
from samestep.kernels.lowering import (
    AXES,
)
from samestep.kernels.program import CONSTANTS


Maker = Callable[[Sample, int, int], Made]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    return compile_reference(tmp_path_factory.mktemp("reference"), "reference_tokens.c")


def below(sample: Sample, end: int) -> int:
    return int(torch.randint(end, (), generator=sample.draw))


def place(sample: Sample, positions: int, features: int) -> list[int]:
    """Draw rows, first row and step, with other rows between and around."""
    first, gap = below(sample, 3), below(sample, 3)
    step = features + gap
    return [first + positions * step + below(sample, 3), first, step]


def make_linear(sample: Sample, features: int, choice: int) -> Made:
    """Products at positions, with and without a bias and an epilogue."""
    positions, out = 1 + choice % 5, 1 + below(sample, 30)
    of_x = place(sample, positions, features)
    of_y = [positions * out, 0, out]
    sample.floats("parameters", out * features + out + 3)
    x, y = sample.by_feature(of_x[0]), sample.by_feature(of_y[0])
    i = [x, y, features, out, 3, (3 + out * features, -1)[choice % 2], 7, positions]
    op = operation(OpKind.LINEAR, [*i, *of_x, *of_y], [0.3], choice // 5 % 4)
    return sample, op, {x: of_x[0], y: of_y[0]}


def make_linear_grad(sample: Sample, features: int, choice: int) -> Made:
    """The gradient of their inputs, with and without a gate."""
    positions, out = 1 + choice % 5, 1 + below(sample, 30)
    of_dy, of_dx = place(sample, positions, out), place(sample, positions, features)
    sample.floats("parameters", out * features + 3)
    rows = [of_dy[0], of_dx[0], of_dx[0]]
    dy, dx, gate = (sample.by_feature(count) for count in rows)
    i = [dy, dx, features, out, 3, (gate, -1)[choice % 2], positions, *of_dy, *of_dx]
    op = operation(OpKind.LINEAR_GRAD_INPUT, i, [1.25])
    op.flags = OpFlag.SLOPE if choice % 3 == 0 else 0
    return sample, op, dict(zip((dy, dx, gate), rows, strict=True))


def make_linear_grad_weight(sample: Sample, features: int, choice: int) -> Made:
    """The gradient of their weight: blocks of terms go across positions."""
    positions, out = 1 + choice % 11, 1 + below(sample, 14)
    features = 1 + features % (256 // out)
    of_dy = place(sample, positions, out)
    allocated, first = positions + 2, below(sample, 3)
    dy = sample.by_feature(of_dy[0])
    shape = (-(-features // 32) * allocated, sample.capacity, 32)
    x = sample.buffer(torch.randn(shape, generator=sample.draw))
    i = [dy, x, features, out, 0, positions, *of_dy, allocated, first, 1]
    return sample, operation(OpKind.LINEAR_GRAD_WEIGHT, i), {dy: of_dy[0]}


def make_norm(sample: Sample, features: int, choice: int) -> Made:
    """LayerNorm, with weight and bias, weight, or neither."""
    positions = 1 + below(sample, 20)
    of_x, of_y = (place(sample, positions, features) for _ in range(2))
    x, y = sample.by_feature(of_x[0]), sample.by_feature(of_y[0])
    kept = [sample.by_feature(positions) for _ in range(2)]
    affine = ([3, 90], [3, -1], [-1, -1])[choice % 3]
    i = [x, y, *kept, features, positions, *of_x, *of_y, *affine]
    rows = {x: of_x[0], y: of_y[0]} | dict.fromkeys(kept, positions)
    return sample, operation(OpKind.LAYER_NORM, i, [1e-5]), rows


def make_norm_grad(sample: Sample, features: int, choice: int) -> Made:
    """Its gradient, with and without those of the parameters."""
    positions = 1 + below(sample, 20)
    if choice % 4 == 0:
        features, positions = 1 + features % 3, 300
    places = [place(sample, positions, features) for _ in range(3)]
    rows = [first[0] for first in places] + [positions, positions, 2 * features]
    buffers = [sample.by_feature(count) for count in rows]
    i = [*buffers[:5], (buffers[5], -1)[choice % 2], features, positions]
    i += [n for numbers in places for n in numbers]
    op = operation(OpKind.LAYER_NORM_GRAD, [*i, (3, -1)[choice // 2 % 2]])
    return sample, op, dict(zip(buffers, rows, strict=True))


def make_sum_rows(sample: Sample, features: int, choice: int) -> Made:
    """Sums over one or two axes, in any order of rows."""
    sizes = [1 + below(sample, 4) for _ in range(4)]
    if choice % 4 == 0:
        sizes[3] = 300
    strides = [below(sample, 9) for _ in sizes]
    last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    out = sizes[0] * sizes[1]
    x, y = sample.by_feature(last + 5), sample.by_feature(out)
    i = [x, y, last + 5, 4, *sizes, *strides]
    return (
        sample,
        operation(OpKind.SUM_ROWS, i, [float(features)]),
        {x: last + 5, y: out},
    )


def axes(sample: Sample, operands: int) -> tuple[list[int], list[list[int]], list[int]]:
    """Draw the sizes of axes, strides of operands, and the rows that those need."""
    sizes = [1] * AXES
    for _ in range(3):
        sizes[below(sample, AXES)] = 1 + below(sample, 5)
    strides = [[below(sample, 7) for _ in sizes] for _ in range(operands)]
    last = [sum((n - 1) * k for n, k in zip(sizes, s, strict=True)) for s in strides]
    return sizes, strides, [row + 3 for row in last]


FLOATS = set(Unary) - {Unary.FROM_INT, Unary.TO_INT}
"""Functions of floats; test_kernels_losses has those of integers."""


def make_unary(sample: Sample, features: int, choice: int) -> Made:
    """A function of one operand, into rows of its own."""
    sizes, (strides, _), (rows, _) = axes(sample, 2)
    made = [math.prod(sizes[n + 1 :]) for n in range(AXES)]
    out = math.prod(sizes) + 2
    x, y = sample.by_feature(rows, 3.0), sample.by_feature(out)
    number = sorted(FLOATS)[features % len(FLOATS)]
    i = [x, y, number, rows, 2, out, 1, *sizes, *strides, *made]
    return sample, operation(OpKind.UNARY, i, [1.5]), {x: rows, y: out}


def make_binary(sample: Sample, features: int, choice: int) -> Made:
    """A function of two operands: rows, parameters or a number."""
    sizes, strides, rows = axes(sample, 2)
    out = math.prod(sizes)
    a, b = (sample.by_feature(count, 3.0) for count in rows)
    y = sample.by_feature(out)
    number = list(Binary)[features % len(Binary)]
    second = (b, -1, -2)[choice % 3]
    steps = strides[1] if second != -2 else [0] * AXES
    i = [a, y, second, number, rows[0], 2, rows[1], 2 if second != -2 else 0]
    op = operation(OpKind.BINARY, [*i, *sizes, *strides[0], *steps], [1.5])
    return sample, op, {a: rows[0], b: rows[1], y: out}


def make_matmul(sample: Sample, features: int, choice: int) -> Made:
    """Products of matrices within each sample, of any strides."""
    groups, m, n = (1 + below(sample, 6) for _ in range(3))
    k = 260 if choice % 9 == 0 else 1 + below(sample, 9)
    strides = [below(sample, 7) for _ in range(6)]
    sizes = ((groups, m, k), (groups, k, n))
    rows = [
        sum((size - 1) * step for size, step in zip(each, part, strict=True)) + 3
        for each, part in zip(sizes, (strides[:3], strides[3:]), strict=True)
    ]
    out = groups * m * n
    a, b, y = (sample.by_feature(count) for count in (*rows, out))
    i = [a, y, b, rows[0], 2, rows[1], 1, groups, m, n, k, *strides]
    return sample, operation(OpKind.MATMUL, i), {a: rows[0], b: rows[1], y: out}


def make_softmax(sample: Sample, features: int, choice: int) -> Made:
    """Softmax of rows that follow each other, also of more than a block."""
    count, times = (270, 1) if choice % 9 == 0 else (features, 1 + choice % 3)
    x, y = (sample.by_feature(count * times, 3.0) for _ in range(2))
    op = operation(OpKind.SOFTMAX, [x, y, count * times, count, choice % 2])
    return sample, op, {x: count * times, y: count * times}


def make_draw(sample: Sample, features: int, choice: int) -> Made:
    """Random numbers in [0, 1), or in (0, 1]."""
    y = sample.by_feature(features)
    first = (0.0, 2.0**-24)[choice % 2]
    op = operation(OpKind.DRAW, [y, features, choice % 5], [first])
    return sample, op, {y: features}


def make_combine(sample: Sample, features: int, choice: int) -> Made:
    """Sums of rows that are given, with and without weights; none, one, and many."""
    rows, out = 1 + below(sample, 20), 1 + below(sample, 9)
    counts = [(0, 1, 1 + below(sample, 4), 260)[below(sample, 4)] for _ in range(out)]
    ends = torch.tensor([0, *counts]).cumsum(0).int()
    total = int(ends[-1])
    terms = torch.randint(rows, (total,), generator=sample.draw, dtype=torch.int32)
    weights = torch.randn(total, generator=sample.draw)
    parts = [part.view(torch.float32) for part in (ends, terms, weights)]
    sample.memory["constants"] = torch.cat(parts)
    places = [CONSTANTS, CONSTANTS + out + 1, CONSTANTS + out + 1 + total]
    places[2] = (places[2], -1)[choice % 2]
    x, y = sample.by_feature(rows), sample.by_feature(out)
    op = operation(OpKind.COMBINE, [x, y, rows, out, *places])
    return sample, op, {x: rows, y: out}


MAKERS = (
    *(make_draw, make_combine),
    *(make_matmul, make_softmax),
    *(make_linear, make_linear_grad, make_linear_grad_weight, make_norm),
    *(make_norm_grad, make_sum_rows, make_unary, make_binary),
)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    ownership=st.tuples(st.integers(0, 5), st.integers(0, 16)),
    features=st.integers(1, 70),
    choice=st.integers(0, 1000),
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
    def made() -> Made:
        sample = Sample(sizes, *ownership, seed, misalignment, specials)
        return make(sample, features, choice)

    check_bits(reference.reference_tokens, made)
