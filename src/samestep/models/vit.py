"""A vision transformer (Dosovitskiy et al. 2021) on small images.

[b, c, h, w] -> patches [b, t, c * p * p] -> linear + position [b, t, width]
             -> transformer blocks -> mean over t -> norm -> linear -> [b, classes]
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.config.model import VitModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Linear
from samestep.models.transformer import Block


class Vit(nn.Module):
    """torch's default initialisation, from its default generator."""

    def __init__(self, recipe: VitModel, data: Dataset) -> None:
        super().__init__()
        channels, height, width = data.input_shape
        patch, self._patch = recipe.patch, recipe.patch
        tokens = (height // patch) * (width // patch)
        self.embed = Linear(channels * patch * patch, recipe.width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, recipe.width))
        blocks = (Block(recipe, causal=False) for _ in range(recipe.depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(recipe.width)
        self.head = Linear(recipe.width, data.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [b, classes] of images [b, c, h, w]."""
        patches = functional.unfold(images, self._patch, stride=self._patch)
        tokens = self.embed(patches.transpose(1, 2)) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens).mean(dim=1)))
        return logits
