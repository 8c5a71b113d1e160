"""Layers on tokens, views, sums and arithmetic of activations."""

import pytest
import torch
from module_gradients import by_kernels, check
from pointwise_calls import Sample, operation, run_with
from torch import Tensor, nn
from torch.nn import functional

from samestep.core import tree
from samestep.kernels.interface import Binary, OpKind, Unary
from samestep.kernels.library import load_kernels
from samestep.kernels.lowering import (
    AXES,
)


class Patches(nn.Module):
    """Linear layers on the patches of an image, as a vision transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(18, 7)
        self.position = nn.Parameter(torch.randn(6, 7))
        self.expand, self.contract = nn.Linear(7, 11), nn.Linear(11, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = functional.unfold(images, 3, stride=3).transpose(1, 2)
        tokens = self.embed(patches) + self.position
        tokens = tokens + self.contract(torch.relu(self.expand(tokens)))
        out: Tensor = self.head(tokens.mean(dim=1))
        return out


class Permuted(nn.Module):
    """Views that no kernel can take as they are, and parts of one layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.split = nn.Linear(4, 6), nn.Linear(5, 9, bias=False)
        self.scale = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(18, 4)

    def forward(self, x: Tensor) -> Tensor:  # [b, 4, 5]
        y = self.mix(x.transpose(1, 2)).transpose(1, 2)  # [b, 6, 5]
        a, b, c = self.split(y).view(len(x), 6, 3, 3).unbind(2)
        joined = torch.cat([a * b, c / 2 - 1], 1)[:, 3:9] * self.scale
        out: Tensor = self.head(joined.flatten(1))
        return out


class TimeFirst(nn.Module):
    """Positions before the samples, as recurrent layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:  # [b, 7, 3]
        steps = self.inner(x.permute(1, 0, 2))
        out: Tensor = self.head(steps[-1] + steps[2:5].sum(0))
        return out


class Mixer(nn.Module):
    """Norms, activations and residual sums, over features and over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(7), nn.LayerNorm((10, 7), bias=False)
        self.expand, self.contract = nn.Linear(7, 9), nn.Linear(9, 7, bias=False)
        self.across, self.plain = nn.Linear(10, 10), nn.LayerNorm(7, bias=False)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:  # [b, 10, 7]
        x = x + self.contract(functional.gelu(self.expand(self.first(x))))
        x = x + torch.tanh(self.across(self.second(x).transpose(1, 2))).transpose(1, 2)
        x = functional.silu(self.plain(x)) * torch.sigmoid(x)
        x = functional.gelu(x, approximate="tanh") - x.exp() / 8
        out: Tensor = self.head(x.mean(1))
        return out


class Shared(nn.Module):
    """Parameters that are used several times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:  # [b, 9, 6]
        for _ in range(3):
            x = x + self.norm(torch.tanh(self.inner(x)))
        out: Tensor = x.mean(1) @ self.inner.weight
        return out


class PositionsNormed(nn.Module):
    """Batch norms whose first dimension has positions or images beside the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 4)
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.images = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:  # [b, 8, 6]
        x = self.images(x.reshape(-1, 2, 2, 6)).view(x.shape)
        x = torch.relu(self.first(self.inner(x).flatten(0, 1))).view(len(x), 8, 5)
        last = self.second(x.transpose(0, 1).reshape(-1, 5)).view(8, len(x), 5)
        out: Tensor = self.head(torch.relu(last).mean(0))
        return out


@pytest.mark.parametrize(
    ("kind", "shape"), [(Patches, (2, 6, 9)), (Mixer, (10, 7)), (Shared, (9, 6))]
)
def test_computing_micro_batches_together_changes_no_bit(
    kind: type[nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    model, sizes = kind(), [9, 32, 1, 40, 7]
    inputs = torch.randn(sum(sizes), *shape)
    labels = torch.randint(3, (len(inputs),))
    together = by_kernels(model, inputs, labels, sizes)
    parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
    alone = {
        (m, m + 1): by_kernels(model, x, y, [len(x)]) for m, (x, y) in enumerate(parts)
    }
    total = tree.reduce(
        len(sizes), alone, lambda a, b: [x + y for x, y in zip(a, b, strict=True)]
    )
    assert all(map(torch.equal, together, total))


def test_gelu_and_its_gradient_are_close_to_float64() -> None:
    x = torch.linspace(-8, 8, 100_001)
    exact = x.double().requires_grad_()
    y = functional.gelu(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    values, slopes = pointwise(Unary.GELU, x), pointwise(Binary.GELU_GRAD, x)
    assert (values.double() - y).abs().max() < 4e-7
    assert (slopes.double() - slope).abs().max() < 1.4e-7


def pointwise(number: Unary | Binary, x: Tensor) -> Tensor:
    """Return a function of x [n], or a gradient for dy = 1."""
    rows = -(-len(x) // 32)
    source = functional.pad(x, (0, rows * 32 - len(x)))
    sample = Sample([32])
    buffers = [sample.buffer(part) for part in (source, torch.ones_like(source))]
    buffers.append(sample.buffer(torch.zeros_like(source)))
    inner = [*(1 for _ in range(AXES - 1)), rows, *axis(1), *axis(1)]
    if isinstance(number, Unary):
        i = [buffers[0], buffers[2], number, rows, 0, rows, 0, *inner]
        op = operation(OpKind.UNARY, i)
    else:
        i = [buffers[1], buffers[2], buffers[0], number, rows, 0, rows, 0, *inner]
        op = operation(OpKind.BINARY, i)
    run_with(load_kernels())(op, sample.call())
    return sample.buffers[buffers[2]][: len(x)]


def axis(stride: int) -> list[int]:
    """Return the strides of axes of which only the inner one is used."""
    return [*(0 for _ in range(AXES - 1)), stride]


@pytest.mark.parametrize("sizes", [[32, 32], [7, 0, 40], [70]])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Patches, (2, 6, 9)),
        (Permuted, (4, 5)),
        (TimeFirst, (7, 3)),
        (Mixer, (10, 7)),
        (Shared, (9, 6)),
        (PositionsNormed, (8, 6)),
    ],
)
def test_gradients_are_those_of_float64(
    kind: type[nn.Module], shape: tuple[int, ...], sizes: list[int]
) -> None:
    torch.manual_seed(1)
    check(kind(), shape, sizes)
