"""Modules in the styles of libraries and tutorials; a function makes each."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


TOKENS, IMAGES, FEATURES = (6, 8), (3, 8, 8), (12,)
CLASSES = 5


class Called(nn.Module):
    """A module whose forward pass is a function of itself and its input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self._forward_function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute logits [b, 5]."""
        return self._forward_function(self, inputs)


def perceptron(*layers: nn.Module) -> nn.Module:
    """Return linear layers 12 -> 9 -> ... -> 9 -> 5 with others between."""
    hidden = [part for layer in layers for part in (nn.Linear(9, 9), layer)]
    return nn.Sequential(nn.Linear(12, 9), *hidden, nn.Linear(9, CLASSES))


class Attention(nn.Module):
    """Attention by hand, as in small GPTs and ViTs."""

    def __init__(self, causal: bool, dropout: float) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 24, bias=False), nn.Linear(8, 8)
        self.drop = nn.Dropout(dropout)
        mask = torch.ones(6, 6)
        self.mask = nn.Buffer(mask.tril() if causal else mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [b, t, 8] to [b, t, 8]."""
        b, t, width = tokens.shape
        parts = self.mix(tokens).chunk(3, dim=-1)
        query, key, value = (p.reshape(b, t, 2, -1).permute(0, 2, 1, 3) for p in parts)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // 2)
        scores = scores.masked_fill(self.mask[:t, :t] == 0, float("-inf"))
        mixed = self.drop(scores.softmax(dim=-1)) @ value
        out: Tensor = self.out(mixed.transpose(1, 2).contiguous().view(b, t, width))
        return out


def _rotate(module: Any, tokens: Tensor) -> Tensor:
    x = module.a(tokens)
    rates = 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8))
    angles = torch.outer(torch.arange(6.0), rates).repeat(1, 2)
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    mixed = x * angles.cos() + turned * angles.sin()
    return torch.as_tensor(module.c(mixed.mean(1)))


def _relative_positions(module: Any, tokens: Tensor) -> Tensor:
    far = (torch.arange(6)[:, None] - torch.arange(6)).abs().clamp(max=3)
    bias = module.p(far).permute(2, 0, 1)
    x = module.a(tokens)
    for _ in range(2):
        x = (x @ x.transpose(1, 2) + bias).softmax(-1) @ x
    return torch.as_tensor(module.c((x + module.w[far[1]]).mean(1)))


def _class_token(module: Any, tokens: Tensor) -> Tensor:
    tokens = torch.cat([module.token.expand(len(tokens), -1, -1), tokens], 1)
    return torch.as_tensor(module.c(module.att(tokens + module.place)[:, 0]))


def class_token() -> nn.Module:
    """Return an encoder with a class token and position embeddings."""
    att = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    parts = {"token": nn.Parameter(torch.randn(1, 1, 8)), "att": att}
    place = nn.Parameter(torch.randn(1, 7, 8))
    return Called(_class_token, **parts, place=place, c=nn.Linear(8, 5))


def _root_mean_square(module: Any, x: Tensor) -> Tensor:
    x = module.a(x)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * module.w
    return torch.as_tensor(module.c(functional.normalize(x, dim=-1)))


def _experts(module: Any, x: Tensor) -> Tensor:
    each = torch.stack([part(x) for part in module.parts], 1)
    shares = functional.softmax(module.gate(x), -1)
    return (each * shares.unsqueeze(-1)).sum(1)


def _u_shape(module: Any, x: Tensor) -> Tensor:
    low = functional.max_pool2d(functional.relu(module.a(x)), 2)
    back = functional.interpolate(module.b(low), scale_factor=2)
    return torch.as_tensor(module.c(torch.cat([back, x], 1)).mean((2, 3)))


def _squeeze(module: Any, x: Tensor) -> Tensor:
    hidden = module.a(x)
    gate = functional.adaptive_avg_pool2d(hidden, 1).flatten(1)
    gate = torch.sigmoid(module.b(gate)).view(-1, 8, 1, 1)
    return torch.as_tensor(module.c((hidden * gate).mean((2, 3))))


def constants() -> nn.Module:
    """Return a module with frozen layers, buffers, and tensors that it makes."""
    module = Called(
        lambda m, x: m.c(
            m.b(m.a(x)[:, m.order] * m.scale)
            + torch.arange(9.0)
            + torch.zeros(len(x), 9)
        ),
        a=nn.Linear(12, 9),
        b=nn.Linear(9, 9),
        c=nn.Linear(9, 5),
        order=nn.Buffer(torch.tensor([3, 4, 5, 0, 1, 2, 8, 6, 7])),
        scale=nn.Buffer(torch.full((1, 9), 0.1)),
    )
    module.get_submodule("b").requires_grad_(False)
    return module


STYLES: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "in-place": (FEATURES, lambda: perceptron(nn.ReLU(inplace=True))),
    "piecewise": (
        FEATURES,
        lambda: perceptron(
            *(nn.LeakyReLU(), nn.ELU(), nn.Softplus(), nn.SELU(), nn.ReLU6()),
            *(nn.PReLU(), nn.Hardswish(), nn.Mish(), nn.LogSigmoid()),
        ),
    ),
    "gates": (
        FEATURES,
        lambda: nn.Sequential(nn.Linear(12, 18), nn.GLU(), nn.Linear(9, CLASSES)),
    ),
    "constants": (FEATURES, constants),
    "norms": (
        FEATURES,
        lambda: Called(
            _root_mean_square,
            a=nn.Linear(12, 9),
            w=nn.Parameter(torch.ones(9)),
            c=nn.Linear(9, 5),
        ),
    ),
    "shared": (
        FEATURES,
        lambda: Called(
            lambda m, x: m.c(functional.relu(m.a(m.a(m.a(x).square())))),
            a=nn.Linear(12, 12),
            c=nn.Linear(12, 5),
        ),
    ),
    "shared-tokens": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c(m.a(m.a(x).square()).mean(1) + m.a(x[:, 0])),
            a=nn.Linear(8, 8),
            c=nn.Linear(8, 5),
        ),
    ),
    "experts": (
        FEATURES,
        lambda: Called(
            _experts,
            parts=nn.ModuleList(nn.Linear(12, 5) for _ in range(3)),
            gate=nn.Linear(12, 3),
        ),
    ),
    "causal-attention": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c((x + m.att(m.n(x)))[:, -1]),
            n=nn.LayerNorm(8),
            att=Attention(causal=True, dropout=0.1),
            c=nn.Linear(8, 5),
        ),
    ),
    "rotary": (
        TOKENS,
        lambda: Called(_rotate, a=nn.Linear(8, 8), c=nn.Linear(8, 5)),
    ),
    "class-token": (TOKENS, class_token),
    "positions": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c((x + m.p(torch.arange(6)) + m.p(m.place))[:, 0]),
            p=nn.Embedding(6, 8),
            place=nn.Buffer(torch.arange(6)[None]),
            c=nn.Linear(8, 5),
        ),
    ),
    "token-types": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c((x + m.p(m.place.expand(len(x), -1)[:, :6]))[:, 0]),
            p=nn.Embedding(3, 8),
            place=nn.Buffer(torch.zeros(1, 9, dtype=torch.int64)),
            c=nn.Linear(8, 5),
        ),
    ),
    "relative-positions": (
        TOKENS,
        lambda: Called(
            _relative_positions,
            a=nn.Linear(8, 8),
            p=nn.Embedding(4, 1),
            w=nn.Parameter(torch.randn(5, 8)),
            c=nn.Linear(8, 5),
        ),
    ),
    "functions-of-parameters": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c((m.a(x) * (m.w + 1) * -m.w.exp().unsqueeze(0)).mean(1)),
            a=nn.Linear(8, 8),
            w=nn.Parameter(torch.randn(8)),
            c=nn.Linear(8, 5),
        ),
    ),
    "instance-norm": (
        IMAGES,
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(288, 5)),
        ),
    ),
    "group-norm": (
        IMAGES,
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Dropout2d(0.3)),
            *(nn.Flatten(), nn.Linear(288, 5)),
        ),
    ),
    "u-shape": (
        IMAGES,
        lambda: Called(
            _u_shape,
            a=nn.Conv2d(3, 4, 3, padding=1),
            b=nn.Conv2d(4, 4, 3, padding=1),
            c=nn.Conv2d(7, 5, 1),
        ),
    ),
    "squeeze": (
        IMAGES,
        lambda: Called(
            _squeeze, a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 8), c=nn.Linear(8, 5)
        ),
    ),
}
"""The shape of a sample, and what makes the module."""
