"""Pooling and norms of images in programs: gradients beside those of float64."""

from collections.abc import Callable

import pytest
import torch
from module_gradients import by_kernels, check
from torch import Tensor, nn
from torch.nn import functional

from samestep.kernels import fusion
from samestep.kernels.library import VARIABLE, supported_isas


Function = Callable[[Tensor], Tensor]
IMAGE = (3, 9, 8)
SIZES = [20, 0, 33, 1, 7]


class Net(nn.Module):
    """Norm -> a function of images -> linear, and a residual sum around the norm."""

    def __init__(self, function: Function, features: int) -> None:
        super().__init__()
        self.function, self.norm = function, nn.BatchNorm2d(3)
        self.head = nn.Linear(features, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Map [b, 3, 9, 8] to [b, 5]."""
        images = functional.relu(self.norm(images) + images)
        logits: Tensor = self.head(self.function(images).flatten(1))
        return logits


POOLS: dict[str, tuple[Function, int]] = {
    "tiling": (lambda x: functional.relu(functional.max_pool2d(x, 2)), 48),
    "overlapping": (lambda x: functional.max_pool2d(x, 3, 1, 1), 216),
    "dilated": (lambda x: functional.max_pool2d(x, (2, 3), 2, 1, (2, 1)), 60),
    "ceiling": (lambda x: functional.max_pool2d(x, 2, ceil_mode=True), 60),
    "adaptive": (lambda x: functional.adaptive_max_pool2d(x, (4, 3)), 36),
    "means": (lambda x: functional.avg_pool2d(x, 3, 2, 1), 60),
    "counted": (
        lambda x: functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        60,
    ),
    "divided": (lambda x: functional.avg_pool2d(x, 2, divisor_override=3), 48),
    "adaptive-means": (lambda x: functional.adaptive_avg_pool2d(x, (4, 3)), 36),
    "global": (lambda x: functional.adaptive_avg_pool2d(x, 1), 3),
    "transposed": (lambda x: functional.max_pool2d(x.transpose(2, 3), 2), 48),
    "one-dimensional": (lambda x: functional.max_pool1d(x.flatten(2), 4), 54),
}


@pytest.mark.parametrize("kind", POOLS)
def test_gradients_of_pooling_are_those_of_float64(kind: str) -> None:
    check(Net(*POOLS[kind]), IMAGE, SIZES, 2e-5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2, 1), nn.ReLU()),
        nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3), nn.ReLU()),
    ],
)
def test_gradients_of_norms_are_those_of_float64(norm: nn.Module) -> None:
    norm = nn.Sequential(nn.Linear(8, 6), norm, nn.Flatten())
    features = norm(torch.randn(2, *IMAGE)).shape[1]
    check(nn.Sequential(norm, nn.Linear(features, 4)), IMAGE, SIZES, 2e-5)


@pytest.mark.parametrize(
    ("conv", "pool"),
    [
        (nn.Conv2d(3, 5, 3), nn.Sequential(nn.MaxPool2d(2), nn.ReLU())),
        (nn.Conv2d(3, 30, 3, padding=1, bias=False), nn.MaxPool2d((3, 2))),
        (nn.Conv2d(3, 6, 2, stride=2, groups=3), nn.MaxPool2d(2)),
    ],
)
def test_pooling_within_a_convolution_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, conv: nn.Module, pool: nn.Module
) -> None:
    features = pool(conv(torch.zeros(1, *IMAGE))).numel()
    model = nn.Sequential(conv, pool, nn.Flatten(), nn.Linear(features, 4))
    inputs, labels = torch.randn(61, *IMAGE), torch.randint(4, (61,))
    apart, joined = list[Tensor](), list[Tensor]()
    for found, isa in [(f, isa) for f in (apart, joined) for isa in supported_isas()]:
        monkeypatch.setenv(VARIABLE, isa)
        monkeypatch.setattr(fusion, "LARGE", 0 if found is joined else 10**9)
        found += by_kernels(model, inputs, labels, SIZES)
    assert all(map(torch.equal, apart, joined))
