"""A residual network (He et al. 2016) for small images.

[b, c, h, w] -> conv 3 x 3 -> norm -> ReLU -> [b, channels[0], h, w]
             -> blocks of each stage; the first of all but the first stage strides by 2
             -> mean over height and width [b, channels[-1]] -> linear -> [b, classes]
"""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from samestep.config.model import ResnetModel
from samestep.data.dataset import Dataset
from samestep.models.layers import Conv2d, Linear


class Block(nn.Module):
    """Two convolutions, whose result is added to what went in.

    [b, before, h, w] -> conv -> norm -> ReLU -> conv -> norm -> add -> ReLU
                      -> [b, after, h / stride, w / stride]
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(before, after, stride)
        self.second = _conv(after, after, 1)
        self.first_norm, self.second_norm = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(after))

    def forward(self, images: Tensor) -> Tensor:
        """Map [b, before, h, w] to [b, after, h / stride, w / stride]."""
        hidden = functional.relu(self.first_norm(self.first(images)))
        hidden = self.second_norm(self.second(hidden))
        return functional.relu(hidden + self.shortcut(images))


class Resnet(nn.Module):
    """Convolutions start as He et al. 2015 say, from torch's default generator."""

    def __init__(self, recipe: ResnetModel, data: Dataset) -> None:
        super().__init__()
        channels, *_ = data.input_shape
        widths = recipe.channels
        self.stem = _conv(channels, widths[0], 1)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks: list[Block] = []
        for stage, (before, after) in enumerate(pairwise((widths[0], *widths))):
            blocks.append(Block(before, after, stride=2 if stage else 1))
            blocks += [Block(after, after, 1) for _ in range(recipe.blocks - 1)]
        self.stages = nn.Sequential(*blocks)
        self.head = Linear(widths[-1], data.outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [b, classes] of images [b, c, h, w]."""
        hidden = functional.relu(self.norm(self.stem(images)))
        logits: Tensor = self.head(self.stages(hidden).mean(dim=(2, 3)))
        return logits


def _conv(before: int, after: int, stride: int) -> Conv2d:
    """Return a 3 x 3 convolution, without a bias, since a norm follows."""
    conv = Conv2d(before, after, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
