"""Layers on tokens, views, sums and arithmetic of activations."""

import pytest
import torch
from module_gradients import check
from torch import Tensor, nn
from torch.nn import functional


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


@pytest.mark.parametrize("sizes", [[32, 32], [7, 0, 40], [70]])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Patches, (2, 6, 9)), (Permuted, (4, 5)), (TimeFirst, (7, 3)), (Mixer, (10, 7))],
)
def test_gradients_are_those_of_float64(
    kind: type[nn.Module], shape: tuple[int, ...], sizes: list[int]
) -> None:
    torch.manual_seed(1)
    check(kind(), shape, sizes)
