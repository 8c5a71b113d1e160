"""Attention in the styles of libraries: by PyTorch, by hand, by its modules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from module_styles import Called
from torch import Tensor, nn
from torch.nn import functional


TOKENS, CLASSES = (6, 8), 5
CAUSAL = torch.ones(6, 6).tril().bool()
BIASES = torch.zeros(6, 6).masked_fill(~CAUSAL, -math.inf)
DISTANCES = torch.arange(6)[:, None] - torch.arange(6)
SLOPES = torch.tensor([0.5, 0.25])[:, None, None]
LOWEST = torch.finfo(torch.float32).min
Function = Callable[..., Any]


def heads(x: Tensor, count: int = 2) -> Tensor:
    """Cut [b, t, width] into [b, heads, t, width / heads]."""
    b, t, width = x.shape
    return x.view(b, t, count, width // count).transpose(1, 2)


class Attention(nn.Module):
    """Attention of some tokens to all, computed by a function."""

    def __init__(
        self,
        attend: Function,
        queries: int = 6,
        query_heads: int = 2,
        value_width: int = 4,
        **parts: Any,
    ) -> None:
        super().__init__()
        self.attend, self.queries, self.query_heads = attend, queries, query_heads
        self.q, self.k = nn.Linear(8, 4 * query_heads), nn.Linear(8, 8)
        self.v = nn.Linear(8, 2 * value_width)
        self.last = nn.Linear(query_heads * value_width, CLASSES)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [b, 5] of tokens [b, 6, 8]."""
        q = heads(self.q(x[:, : self.queries]), self.query_heads)
        y = self.attend(self, x, q, heads(self.k(x)), heads(self.v(x)))
        logits: Tensor = self.last(y.transpose(1, 2).flatten(2)[:, 1:].mean(1))
        return logits


def by_torch(mask: Function = lambda *_: None, **options: Any) -> Function:
    """Return attention by PyTorch's function, with a mask made of module and tokens."""

    def attend(module: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = mask(module, x)
        return functional.scaled_dot_product_attention(q, k, v, made, **options)

    return attend


def by_hand(change: Function = lambda _, __, scores: scores) -> Function:
    """Return attention by products and softmax; a function changes the scores."""

    def attend(module: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(4)
        shares = functional.softmax(change(module, x, scores), dim=-1)
        return functional.dropout(shares, 0.2, module.training) @ v

    return attend


def is_token(_: Any, x: Tensor) -> Tensor:
    """Return which keys are no padding, [b, 1, 1, keys]: of some samples, none."""
    return (x[..., 0] > 0)[:, None, None]


def finite(module: Any, x: Tensor) -> Tensor:
    """Return 0 for tokens and the lowest float for padding, as in Hugging Face.

    One token is there always: of no token, PyTorch 2.13's gradients are wrong.
    """
    some = is_token(module, x) | (DISTANCES[0] == 0)
    return (1.0 - some.to(torch.float32)) * LOWEST


def repeated(_: Any, x: Tensor) -> Tensor:
    """Return a constant mask of every sample."""
    mask = torch.ones(len(x), 6)
    mask[:, 4:] = 0
    return mask[:, None, None].bool()


def pixels(module: Any, x: Tensor) -> Tensor:
    """Attend to pixels in the order of columns, with a single head."""
    y = module.a(x).permute(0, 3, 2, 1).flatten(1, 2).unsqueeze(1)
    y = functional.scaled_dot_product_attention(y, y, y).squeeze(1)
    return torch.as_tensor(module.c(y[:, :5].mean(1)))


def windows(module: Any, x: Tensor) -> Tensor:
    """Attend within windows, which count as samples, each with a mask of its own."""
    q, k, v = (heads(part) for part in module.mix(x.view(-1, 3, 8)).chunk(3, -1))
    scores = (q @ k.transpose(-2, -1)).view(-1, 2, 2, 3, 3) + module.masks[
        None, :, None
    ]
    y = scores.view(-1, 2, 3, 3).softmax(-1) @ v
    return torch.as_tensor(module.c(y.transpose(1, 2).reshape(-1, 6, 8).mean(1)))


class Wrapped(nn.Module):
    """A module of PyTorch that takes tokens and masks."""

    def __init__(self, module: nn.Module, is_first: bool, call: Function) -> None:
        super().__init__()
        self.module, self.is_first, self.call = module, is_first, call
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [b, 5]; the module may take tokens before samples."""
        y = self.call(self.module, x if self.is_first else x.transpose(0, 1), x)
        logits: Tensor = self.last(y.mean(1 if self.is_first else 0))
        return logits


def multihead(is_first: bool, dropout: float, **masks: Any) -> nn.Module:
    """Return PyTorch's attention, of the first tokens to all if batches come first."""

    def call(module: Any, y: Tensor, x: Tensor) -> Tensor:
        is_padding = (x[..., 0] < -1) & (DISTANCES[0] != 0)
        padding = torch.where(is_padding, -math.inf, 0.0)
        query = y[:, :2] if is_first else y
        out, shares = module(query, y, y, key_padding_mask=padding, **masks)
        return torch.as_tensor(
            out if shares is None else out + shares.mean((1, 2), keepdim=True)
        )

    attention = nn.MultiheadAttention(8, 2, dropout, batch_first=is_first)
    return Wrapped(attention, is_first, call)


def layers(kind: str, is_first: bool, norm_first: bool, **masks: Any) -> nn.Module:
    """Return two layers of PyTorch's encoder or decoder, with dropout."""
    options: dict[str, Any] = {
        "dropout": 0.1,
        "batch_first": is_first,
        "norm_first": norm_first,
    }
    if kind == "encoder":
        layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        return Wrapped(
            encoder,
            is_first,
            lambda m, y, x: m(y, src_key_padding_mask=x[..., 0] < -1, **masks),
        )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, **options), 2)
    return Wrapped(
        decoder,
        is_first,
        lambda m, y, x: m(y.tanh(), y, memory_key_padding_mask=x[..., 0] < -1, **masks),
    )


STYLES: dict[str, Callable[[], nn.Module]] = {
    "truth values": lambda: Attention(by_torch(lambda *_: CAUSAL)),
    "buffer": lambda: Attention(
        by_torch(lambda m, _: m.mask), mask=nn.Buffer(BIASES[None, None])
    ),
    "ALiBi": lambda: Attention(by_torch(lambda *_: SLOPES * -DISTANCES.abs())),
    "padding": lambda: Attention(by_torch(is_token)),
    "finite padding": lambda: Attention(by_torch(finite)),
    "padding and causal": lambda: Attention(
        by_torch(lambda m, x: is_token(m, x) & CAUSAL)
    ),
    "padding, repeated": lambda: Attention(
        by_torch(lambda m, x: is_token(m, x).expand(-1, 2, 6, -1))
    ),
    "of every score": lambda: Attention(
        by_torch(lambda _, x: heads(x)[..., :1] > heads(x)[..., 1:2].mT)
    ),
    "constant for every sample": lambda: Attention(by_torch(repeated)),
    "learned": lambda: Attention(
        by_torch(lambda m, x: m.bias + finite(m, x)),
        bias=nn.Parameter(torch.randn(1, 2, 6, 6)),
    ),
    "of a layer": lambda: Attention(
        by_torch(lambda m, x: m.gate(x).transpose(1, 2).unsqueeze(2)),
        gate=nn.Linear(8, 2),
    ),
    "dropout": lambda: Attention(by_torch(is_token, dropout_p=0.2)),
    "causal dropout": lambda: Attention(by_torch(is_causal=True, dropout_p=0.2)),
    "cross": lambda: Attention(by_torch(is_token), queries=3),
    "cross causal": lambda: Attention(by_torch(is_causal=True), queries=3),
    "groups": lambda: Attention(by_torch(is_token, enable_gqa=True), query_heads=6),
    "one group": lambda: Attention(
        by_torch(is_causal=True, dropout_p=0.2, enable_gqa=True), query_heads=4
    ),
    "wide values": lambda: Attention(by_torch(lambda *_: BIASES), value_width=6),
    "by hand": lambda: Attention(
        by_hand(lambda m, x, s: s.masked_fill(~is_token(m, x), LOWEST))
    ),
    "by hand, where": lambda: Attention(
        by_hand(lambda _, __, s: torch.where(CAUSAL, s, torch.tensor(LOWEST)))
    ),
    "by hand, learned": lambda: Attention(
        by_hand(lambda m, x, s: s + m.bias + finite(m, x)),
        bias=nn.Parameter(torch.randn(2, 6, 6)),
    ),
    "windows": lambda: Called(
        windows,
        mix=nn.Linear(8, 24),
        masks=nn.Buffer(torch.randn(2, 3, 3)),
        c=nn.Linear(8, CLASSES),
    ),
    "multihead": lambda: multihead(True, 0.1, attn_mask=BIASES[:2]),
    "multihead, tokens first": lambda: multihead(
        False, 0.0, attn_mask=BIASES, need_weights=False
    ),
    "encoder": lambda: layers("encoder", True, False),
    "encoder, tokens first": lambda: layers("encoder", False, True, mask=~CAUSAL),
    "decoder": lambda: layers("decoder", True, True, tgt_mask=BIASES),
    "decoder, tokens first": lambda: layers(
        "decoder", False, False, tgt_mask=BIASES, tgt_is_causal=True
    ),
}
"""What makes each module; tokens are [6, 8]."""
