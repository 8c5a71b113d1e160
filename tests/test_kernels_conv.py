"""Convolutions: bit for bit those of a plain C reference."""

import ctypes
from ctypes import c_float, c_int32, c_int64
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from module_gradients import LOSS, by_kernels, check
from test_kernels_products import (
    GUARD,
    PANEL,
    Example,
    Floats,
    address,
    by_panels,
    compiled,
    each_isa,
    equal,
    from_panels,
    micro_batches,
    numbers,
    run,
    summed,
    unaligned,
)
from torch import Tensor, nn

from samestep.kernels import fusion
from samestep.kernels.interface import Op, OpFlag, OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


@dataclass(frozen=True)
class Shape:
    """A convolution, height before width."""

    channels: tuple[int, int]
    groups: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def plane(self) -> tuple[int, int]:
        """The pixels of the outputs."""
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                *(self.image, self.kernel, self.stride, self.padding, self.dilation),
                strict=True,
            )
        ]
        return sizes[0], sizes[1]

    @property
    def numbers(self) -> list[int]:
        """The numbers that all operations have in common."""
        pairs = self.image, self.kernel, self.stride, self.padding, self.dilation
        return [*self.channels, self.groups, *(n for pair in pairs for n in pair)]

    @property
    def terms(self) -> int:
        """Weights of an output channel."""
        return self.channels[0] // self.groups * int(np.prod(self.kernel))

    def for_c(self) -> ctypes.Array[c_int64]:
        """Return the structure of the reference."""
        return (c_int64 * 13)(*self.numbers)


@pytest.fixture(scope="session")
def reference_conv(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the plain loops."""
    return compiled("reference_conv.c", tmp_path_factory.mktemp("reference"))


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Return any small convolution whose output has a pixel."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    channels = [groups * draw(st.integers(1, 7)) for _ in range(2)]
    many = draw(st.sampled_from([0, 0, 0, 30]))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    height, width = (n + draw(st.integers(0, 6)) for n in least)
    return Shape(
        (channels[0] + many * groups, channels[1]),
        *(groups, (height, width), kernel, stride, padding, dilation),
    )


COMMON = [
    Shape((1, 13), 1, (21, 20), (5, 5)),
    Shape((29, 14), 1, (6, 7), (3, 3)),
    Shape((32, 17), 1, (4, 4), (3, 3), (1, 1), (1, 1)),
    Shape((6, 6), 6, (9, 9), (3, 3), (1, 1), (1, 1)),
    Shape((10, 13), 1, (8, 8), (3, 3), (2, 2), (1, 1)),
    Shape((40, 7), 1, (5, 5), (1, 1), (2, 2)),
    Shape((3, 4), 1, (11, 13), (7, 7), (2, 2), (3, 3)),
]
any_shape = st.sampled_from(COMMON) | shapes()
few = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any)


class Convolution(Example):
    """A convolution with `starts[-1]` samples: arrays as the reference has them."""

    def __init__(self, shape: Shape, pieces: list[int], seed: int) -> None:
        rows = shape.channels[0] * int(np.prod(shape.image))
        self.shape, self.out = shape, shape.channels[1]
        super().__init__(rows, self.out * int(np.prod(shape.plane)), pieces, seed)
        draws = np.random.default_rng(seed)
        self.weight = self.draw(draws, self.out, shape.terms)
        self.bias = self.draw(draws, self.out)

    def parameters(self) -> Floats:
        """Return a vector of parameters: 3 others, the weight, the bias."""
        others = np.full(3, GUARD, np.float32)
        return unaligned(np.concatenate([others, self.weight.ravel(), self.bias]))

    def room(self, rows: int) -> Floats:
        """Return panels of that many rows, which something else stands in."""
        panels = self.capacity // PANEL
        return unaligned(np.full((panels, rows, PANEL), GUARD, np.float32))

    def numbers(self, first: int, second: int, *rest: int) -> ctypes.Array[c_int64]:
        """Return the numbers of an operation."""
        return numbers(first, second, *self.shape.numbers, *rest)


@each_isa
@settings(max_examples=12)
@given(any_shape, st.integers(1, 40), st.booleans(), st.booleans(), st.integers(0))
def test_a_convolution_equals_the_reference(
    reference_conv: ctypes.CDLL,
    isa: str,
    shape: Shape,
    samples: int,
    has_bias: bool,
    is_relu: bool,
    seed: int,
) -> None:
    example = Convolution(shape, [samples], seed)
    x, y = unaligned(by_panels(example.x.T)), example.room(example.outputs)
    bias = 3 + example.weight.size if has_bias else -1
    flags = OpFlag.RELU if is_relu else 0
    op = Op(kind=OpKind.CONV, flags=flags, i=example.numbers(0, 1, 3, bias, 0))
    run(load_kernels(isa), op, example, [x, y], example.parameters())
    expected = np.empty((samples, example.outputs), np.float32)
    reference_conv.conv(
        *(shape.for_c(), address(example.x), address(example.weight)),
        *(address(example.bias if has_bias else None), address(expected)),
        *(c_int64(samples), c_int32(is_relu)),
    )
    assert equal(from_panels(y, samples).T.copy(), expected)


@each_isa
@settings(max_examples=12)
@given(any_shape, st.integers(1, 40), st.booleans(), st.integers(0))
def test_the_gradient_of_the_images_equals_the_reference(
    reference_conv: ctypes.CDLL,
    isa: str,
    shape: Shape,
    samples: int,
    has_gate: bool,
    seed: int,
) -> None:
    example = Convolution(shape, [samples], seed)
    dy, gate = unaligned(by_panels(example.dy.T)), unaligned(by_panels(example.x.T))
    dx = example.room(example.inputs)
    op = Op(
        kind=OpKind.CONV_GRAD_INPUT,
        i=example.numbers(0, 1, 3, 2 if has_gate else -1, -1),
        f=(c_float * 4)(1.25),
    )
    run(load_kernels(isa), op, example, [dy, dx, gate], example.parameters())
    expected = np.empty((samples, example.inputs), np.float32)
    reference_conv.conv_grad_input(
        *(shape.for_c(), address(example.dy), address(example.weight)),
        *(address(example.x if has_gate else None), c_float(1.25)),
        *(address(expected), c_int64(samples)),
    )
    assert equal(from_panels(dx, samples).T.copy(), expected)


@each_isa
@settings(max_examples=12)
@given(any_shape, few, st.booleans(), st.integers(0))
def test_the_gradients_of_kernel_and_bias_equal_the_reference(
    reference_conv: ctypes.CDLL,
    isa: str,
    shape: Shape,
    pieces: list[int],
    has_bias: bool,
    seed: int,
) -> None:
    example = Convolution(shape, pieces, seed)
    leaves, size = [], example.weight.size
    for samples in micro_batches(example):
        dy, x = example.dy[samples].copy(), example.x[samples].copy()
        leaf = np.empty(size + example.out, np.float32)
        dw, db = leaf[:size], leaf[size:]
        reference_conv.conv_grad_weight(
            *(shape.for_c(), *map(address, (dy, x, dw, db)), c_int64(len(x)))
        )
        leaves.append(leaf)
    left = summed(example, leaves)
    room = size + example.out + 4
    slots = [unaligned(np.full(room, GUARD, np.float32)) for _ in left]
    buffers = [by_panels(example.dy.T), by_panels(example.x.T), example.room(512)]
    i = example.numbers(0, 1, 2, 2 + size if has_bias else -1, 2, -1)
    op = Op(kind=OpKind.CONV_GRAD_WEIGHT, i=i)
    run(load_kernels(isa), op, example, buffers, example.bias, slots)
    for slot, expected in zip(slots, left, strict=True):
        end = room - 4 if has_bias else size
        assert equal(slot[2 : 2 + end], expected[:end])
        assert np.all(slot[[0, 1, *range(2 + end, room)]] == GUARD)


class Autoencoder(nn.Module):
    """Strides, groups, dilation, transposed convolutions, and those of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, 2, padding=1), nn.ReLU(), nn.Dropout(0.0)),
            *(nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=3), nn.ReLU()),
            *(nn.Conv2d(6, 6, (1, 3), padding=(1, 0), groups=6, bias=False), nn.ReLU()),
        )
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=(1, 0), groups=2),
            *(nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)),
        )
        self.sequence = nn.Conv1d(2, 5, 3, stride=2)
        self.head = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        images = self.decode(self.encode(images))
        out: Tensor = self.head(torch.relu(self.sequence(images.flatten(2))).mean(2))
        return out


@pytest.mark.parametrize("sizes", [[32, 32], [7, 9, 0, 4]])
def test_gradients_of_convolutions_are_those_of_float64(sizes: list[int]) -> None:
    torch.manual_seed(1)
    check(Autoencoder(), (3, 8, 7), sizes)


def test_activations_and_their_gradients_become_part_of_convolutions() -> None:
    torch.manual_seed(1)
    layers = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 5, 2)
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    program = lower(model, (2, 5, 5), places_of(Flat(model)), LOSS)
    assert [op.kind.name for op in program.ops] == [
        *("LOAD", "CONV", "CONV", "LINEAR", "CROSS_ENTROPY"),
        *("LINEAR_GRAD_INPUT", "GRAD_BIAS", "TRANSPOSE", "LINEAR_GRAD_WEIGHT"),
        *("CONV_GRAD_WEIGHT", "CONV_GRAD_INPUT", "CONV_GRAD_WEIGHT"),
    ]


@pytest.mark.parametrize("window", [(2, 2), (3, 2)])
def test_the_gradient_of_pooling_becomes_part_of_the_first_convolution(
    monkeypatch: pytest.MonkeyPatch, window: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    pool = nn.MaxPool2d(window, ceil_mode=window == (3, 2))
    layers = nn.Conv2d(2, 7, 3, padding=1), pool, nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.LazyLinear(3))
    images, labels = torch.randn(50, 2, 20, 15), torch.randint(3, (50,))
    model(images)
    kinds = [
        op.kind for op in lower(model, (2, 20, 15), places_of(Flat(model)), LOSS).ops
    ]
    assert OpKind.MAX_POOL_GRAD not in kinds
    joined = by_kernels(model, images, labels, [32, 18])
    monkeypatch.setattr(fusion, "_join_pool_grad", lambda *_: None)
    for found, expected in zip(
        joined, by_kernels(model, images, labels, [32, 18]), strict=True
    ):
        assert torch.equal(found, expected)
