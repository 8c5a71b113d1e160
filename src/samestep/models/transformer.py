"""Transformer blocks (Vaswani et al. 2017; pre-norm as in Radford et al. 2019).

[b, t, width] -> (norm -> attention -> add -> norm -> linear -> GELU -> linear -> add)
                 for each block -> norm -> [b, t, width]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.config.model import TransformerModel, VitModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Linear, dropout_masks


class Block(nn.Module):
    """Attention over the tokens, then two linear layers on each of them."""

    def __init__(self, recipe: TransformerModel | VitModel, causal: bool) -> None:
        super().__init__()
        self._heads, self._dropout = recipe.heads, recipe.dropout
        self._causal, width = causal, recipe.width
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * width)
        self.project = Linear(width, width)
        self.expand, self.contract = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [b, t, width] to [b, t, width]."""
        tokens = tokens + self._drop(self._attend(self.first_norm(tokens)))
        hidden = functional.gelu(self.expand(self.second_norm(tokens)))
        return tokens + self._drop(self.contract(hidden))

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        # [b, t, 3 * width] -> 3 x [b, heads, t, width / heads]
        split = self.query_key_value(tokens).view(batch, length, 3, self._heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self._causal
        )
        out: Tensor = self.project(mixed.transpose(1, 2).reshape(tokens.shape))
        return out

    def _drop(self, tokens: Tensor) -> Tensor:
        if not self.training or not self._dropout:
            return tokens
        batch, length, width = tokens.shape
        rows = batch * length
        (mask,) = dropout_masks(self._dropout, rows, [width], tokens.device)
        return tokens * mask.view(tokens.shape)


class Transformer(nn.Module):
    """A decoder: predicts each next token from those before it.

    [b, t] -> embedding + position [b, t, width] -> blocks -> norm
           -> linear -> logits [b, t, tokens]
    """

    def __init__(self, recipe: TransformerModel, data: Dataset) -> None:
        super().__init__()
        (context,) = data.input_shape
        self.embed = nn.Embedding(data.outputs, recipe.width)
        self.position = nn.Parameter(torch.zeros(context, recipe.width))
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.position, std=0.02)
        blocks = (Block(recipe, causal=True) for _ in range(recipe.depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(recipe.width)
        self.head = Linear(recipe.width, data.outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute logits [b, t, tokens] of int64 [b, t]; t is at most the context."""
        hidden = self.embed(tokens) + self.position[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits
