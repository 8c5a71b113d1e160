"""Small modules whose operations are those of many users, several in each."""

from collections.abc import Callable
from typing import Any

import torch
from module_styles import CLASSES, FEATURES, IMAGES, TOKENS, Called
from torch import Tensor, nn
from torch.nn import functional


Made = tuple[tuple[int, ...], Callable[[], nn.Module]]


def of_features(*functions: Callable[[Tensor], Tensor], width: int = 9) -> Made:
    """Return what maps features [b, 9] by functions, one after the other."""

    def forward(module: Any, x: Tensor) -> Tensor:
        x = module.a(x)
        for function in functions:
            x = function(x)
        return torch.as_tensor(module.c(x))

    return FEATURES, lambda: Called(
        forward, a=nn.Linear(12, 9), c=nn.Linear(width, CLASSES)
    )


def of_tokens(*functions: Callable[[Tensor], Tensor]) -> Made:
    """Return the sum of functions that map tokens [b, 6, 8] to [b, 8]."""
    return TOKENS, lambda: Called(
        lambda m, x: m.c(sum(f(m.a(x)) for f in functions)),
        a=nn.Linear(8, 8),
        c=nn.Linear(8, CLASSES),
    )


def of_images(*functions: Callable[[Tensor], Tensor]) -> Made:
    """Return functions of images [b, 4, 8, 8], one after the other."""

    def forward(module: Any, x: Tensor) -> Tensor:
        x = module.a(x)
        for function in functions:
            x = function(x)
        return torch.as_tensor(x.flatten(1)[:, :40] @ module.w)

    weight = nn.Parameter(torch.randn(40, CLASSES))
    return IMAGES, lambda: Called(forward, a=nn.Conv2d(3, 4, 3, padding=1), w=weight)


def _latent(module: Any, x: Tensor) -> Tensor:
    mean, spread = module.a(x).chunk(2, -1)
    noise = torch.randn_like(mean)
    return torch.as_tensor(module.c(mean + noise * torch.exp(0.5 * spread)))


def _sampled(module: Any, x: Tensor) -> Tensor:
    mean, spread = module.a(x).chunk(2, -1)
    normal = torch.distributions.Normal(mean, functional.softplus(spread) + 1e-3)
    return torch.as_tensor(module.c(normal.rsample()))


def autoencoder(forward: Callable[[Any, Tensor], Tensor]) -> Made:
    """Return a module with a latent variable."""
    return FEATURES, lambda: Called(forward, a=nn.Linear(12, 8), c=nn.Linear(4, 5))


def _frozen(module: nn.Module) -> nn.Module:
    """Put BatchNorms into evaluation mode, with statistics of their own."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.eval()
            for number, buffer in enumerate(part.buffers()):
                if buffer.is_floating_point():
                    nn.init.uniform_(buffer, number + 0.5, number + 2.0)
    return module


def _nearest_code(module: Any, x: Tensor) -> Tensor:
    x = module.a(x)
    distances = ((x[:, None] - module.codes) ** 2).sum(-1)
    code = functional.embedding(distances.argmin(1), module.codes)
    return torch.as_tensor(module.c(x + (code - x).detach() + code))


def codebook() -> nn.Module:
    """Return a quantised autoencoder."""
    codes = nn.Parameter(torch.randn(7, 9))
    return Called(_nearest_code, a=nn.Linear(12, 9), codes=codes, c=nn.Linear(9, 5))


def _points(module: Any, x: Tensor) -> Tensor:
    each = module.b(module.a(x.transpose(1, 2)).relu())
    return torch.as_tensor(module.c(each.max(2)[0]))


def _masked_bias(module: Any, x: Tensor) -> Tensor:
    """Mix positions by a learned bias, none of them with later ones, as T5 does."""
    far = (torch.arange(6)[:, None] - torch.arange(6)).abs().clamp(max=3)
    is_before = torch.ones(6, 6, dtype=torch.bool).tril()
    for _ in range(2):
        bias = torch.where(is_before, module.p(far)[..., 0], -1e9)
        x = x + ((x @ x.transpose(1, 2)) + bias).softmax(-1) @ module.a(x)
    x, all_of_it = x.unsqueeze(1), torch.zeros(1, 1, 6, 6)
    x = functional.scaled_dot_product_attention(x, x, x, attn_mask=all_of_it)
    return torch.as_tensor(module.c(x.mean((1, 2))))


def _contracted(module: Any, x: Tensor) -> Tensor:
    """Multiply by parameters in Einstein's notation."""
    x = torch.einsum("btd,de->bte", x, module.w)
    x = torch.einsum("bthe,hg->btge", x.view(len(x), 6, 2, 4), module.mix).flatten(2)
    return torch.as_tensor(module.c(torch.einsum("btd,t->bd", x, module.share)))


def _bags(module: Any, x: Tensor) -> Tensor:
    tokens = module.a(x).argmax(-1)
    return torch.as_tensor(module.c(sum(bag(tokens) for bag in module.bags)))


ORDER = torch.tensor([2, 0, 1, 2, 5, 4, 8, 7, 3])
OPERATIONS: dict[str, Made] = {
    "latent": autoencoder(_latent),
    "distribution": autoencoder(_sampled),
    "uniform-noise": of_features(
        lambda x: x * torch.rand_like(x) + torch.rand(len(x), 1),
        lambda x: x + torch.empty_like(x).uniform_(-1, 1),
        lambda x: x * (torch.rand_like(x) > 0.3).float(),
    ),
    "normal-noise": of_features(
        lambda x: torch.normal(x, 0.1) + torch.randn(x.shape),
        lambda x: x + torch.normal(torch.zeros_like(x), torch.ones_like(x)),
        lambda x: x + x.new_empty(x.shape).normal_(0.5, 2.0),
    ),
    "bernoulli": of_features(
        lambda x: x * torch.bernoulli(torch.sigmoid(x)),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
        lambda x: x * torch.empty_like(x).bernoulli_(0.8),
        nn.AlphaDropout(0.2),
    ),
    "gumbel": of_features(lambda x: functional.gumbel_softmax(x, tau=0.7)),
    "extremes": of_tokens(
        lambda x: x.max(1).values,
        lambda x: x.amax(1) - x.amin(1),
        lambda x: (x - x.min(1, keepdim=True).values).sum(1),
        lambda x: x.logsumexp(1),
        lambda x: x.relu().amax((1, 2))[:, None],
    ),
    "norms-of-vectors": of_tokens(
        lambda x: functional.normalize(x, p=1.0, dim=-1).sum(1),
        lambda x: x.norm(p=3, dim=1),
        lambda x: functional.cosine_similarity(x, x[:, :1], dim=-1)[:, :1],
        lambda x: torch.cat(torch.var_mean(x[:, :, :4], 1), -1),
        lambda x: torch.std_mean(x, 1)[0],
    ),
    "points": (
        TOKENS,
        lambda: Called(
            _points, a=nn.Conv1d(8, 8, 1), b=nn.Conv1d(8, 9, 1), c=nn.Linear(9, 5)
        ),
    ),
    "codebook": (FEATURES, codebook),
    "cumulative": of_tokens(
        lambda x: x.cumsum(1).mean(1), lambda x: x.flip(1).cumsum(2)[:, 2]
    ),
    "moves": of_features(
        lambda x: x.flip(-1) + x.roll(2, 1),
        lambda x: x[:, [2, 0, 1, 2, 5, 4, 8, 7, 3]],
        lambda x: x.index_select(1, ORDER),
        lambda x: x.gather(1, ORDER.expand(len(x), 9)),
        lambda x: x.repeat(1, 2)[:, 3:12],
    ),
    "triangles": of_tokens(
        lambda x: x.mean(1),
        lambda x: (x @ x.transpose(1, 2)).tril().sum(1)[:, :1],
        lambda x: (x @ x.transpose(1, 2)).triu(1).sum((1, 2))[:, None],
        lambda x: x[:, :, :6].diagonal(dim1=1, dim2=2).sum(1)[:, None],
    ),
    "padding": of_images(
        lambda x: functional.pad(x, (1, 2, 0, 1)),
        lambda x: functional.pad(x, (1, -2, 0, 1), value=0.5),
        lambda x: functional.pad(x, (1, 2, 1, 1), mode="reflect"),
        lambda x: functional.pad(x, (1, 0, 1, 1), mode="replicate"),
        lambda x: functional.pad(x, (2, 1, 0, 1), mode="circular"),
    ),
    "nearest": of_images(
        lambda x: functional.interpolate(x, size=(12, 11)),
        lambda x: functional.interpolate(x, size=(5, 13), mode="nearest-exact"),
    ),
    "linear": of_images(
        lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: functional.interpolate(
            x, size=(11, 5), mode="bilinear", align_corners=True
        ),
        lambda x: functional.interpolate(x.flatten(2), size=70, mode="linear"),
    ),
    "shuffles": of_images(
        lambda x: functional.pixel_shuffle(x, 2),
        lambda x: functional.pixel_unshuffle(x, 4),
        lambda x: functional.channel_shuffle(x, 4),
        lambda x: functional.fold(functional.unfold(x, 2), (4, 4), 2),
    ),
    "local-response": of_images(
        nn.LocalResponseNorm(3, alpha=0.1), nn.LocalResponseNorm(2)
    ),
    "instance-norm": of_images(
        nn.InstanceNorm2d(4), nn.ReLU(), nn.InstanceNorm2d(4, eps=1e-3)
    ),
    "affine-instance-norm": (
        IMAGES,
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True),
            nn.Flatten(),
            nn.Linear(144, CLASSES),
        ),
    ),
    "frozen-norms": (
        FEATURES,
        lambda: _frozen(
            nn.Sequential(
                nn.Linear(12, 9),
                nn.BatchNorm1d(9),
                nn.ReLU(),
                nn.Linear(9, 9),
                nn.BatchNorm1d(9, affine=False),
                nn.Linear(9, CLASSES),
            )
        ),
    ),
    "frozen-image-norms": (
        IMAGES,
        lambda: _frozen(
            nn.Sequential(
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(144, CLASSES),
            )
        ),
    ),
    "shrinking": of_features(
        nn.CELU(0.8), nn.Softshrink(0.1), nn.Hardshrink(0.2), nn.Threshold(-1.0, 0.3)
    ),
    "powers": of_features(
        lambda x: torch.log2(x.abs() + 1) + 2.0**x,
        lambda x: torch.exp2(-x.abs()) + (x.abs() + 0.1) ** (x * 0.1),
        lambda x: torch.sinh(x * 0.1) + torch.cosh(x * 0.1) + torch.log10(1 + x * x),
        lambda x: torch.lerp(x, x * 2, 0.3) + torch.addcmul(x, x, x, value=0.5),
        lambda x: torch.addcdiv(x, x, x.abs() + 1, value=0.5).clamp(
            torch.tensor(-3.0), torch.tensor(3.0)
        ),
    ),
    "rounding": of_features(
        lambda x: x + (x.round() - x).detach() + x.floor(),
        lambda x: x % 0.7 + x.trunc() + x.ceil(),
    ),
    "masked-bias": (
        TOKENS,
        lambda: Called(
            _masked_bias, a=nn.Linear(8, 8), p=nn.Embedding(4, 1), c=nn.Linear(8, 5)
        ),
    ),
    "contracted": (
        TOKENS,
        lambda: Called(
            _contracted,
            w=nn.Parameter(torch.randn(8, 8)),
            mix=nn.Parameter(torch.randn(2, 2)),
            share=nn.Parameter(torch.randn(6)),
            c=nn.Linear(8, CLASSES),
        ),
    ),
    "bags": (
        TOKENS,
        lambda: Called(
            _bags,
            a=nn.Linear(8, 9).requires_grad_(False),
            bags=nn.ModuleList(
                nn.EmbeddingBag(9, 8, mode=mode, sparse=mode == "sum")
                for mode in ("sum", "mean", "max")
            ),
            c=nn.Linear(8, CLASSES),
        ),
    ),
    "pooled-to-one": of_images(
        lambda x: (
            x
            * nn.AdaptiveAvgPool2d(1)(x.to(memory_format=torch.channels_last))
            * nn.AdaptiveAvgPool1d(1)(x.flatten(2).transpose(1, 2)).view(-1, 1, 8, 8)
        ),
    ),
    "depthwise": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c(
                functional.conv1d(x, m.w.squeeze(2).unsqueeze(1), groups=6).mean(-1)
            ),
            w=nn.Parameter(torch.randn(6, 3, 1)),
            c=nn.Linear(6, CLASSES),
        ),
    ),
    "recurrent-dropout": (
        TOKENS,
        lambda: Called(
            lambda m, x: m.c(m.b(m.a(x)[0].transpose(0, 1))[1][0][-1]),
            a=nn.GRU(8, 4, 3, dropout=0.5, batch_first=True, bidirectional=True),
            b=nn.LSTM(8, 4, 2, bias=False, dropout=0.3),
            c=nn.Linear(4, CLASSES),
        ),
    ),
    "viewed-pool": (
        (3, 16),
        lambda: Called(
            lambda m, x: m.c(
                functional.max_pool2d(m.a(x).view(-1, 4, 4, 4), 2).flatten(1)
            ),
            a=nn.Conv1d(3, 4, 3, padding=1),
            c=nn.Linear(16, CLASSES),
        ),
    ),
    "large-viewed-pool": (
        (3, 1024),
        lambda: Called(
            lambda m, x: m.c(
                functional.max_pool2d(m.a(x).view(-1, 8, 32, 32), 2).amax((2, 3))
            ),
            a=nn.Conv1d(3, 8, 3, padding=1),
            c=nn.Linear(8, CLASSES),
        ),
    ),
}
"""The shape of a sample, and what makes the module."""
