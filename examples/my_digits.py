"""Your own model, data and loss, for docs/own-code.md.

samestep train --model my_digits:build --data my_digits:load --loss my_digits:loss
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def build(inputs: tuple[int, ...], outputs: int, width: int = 32) -> nn.Module:
    """Return the model; `inputs` is the shape of a sample, `outputs` counts classes."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs[0] * inputs[1], width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(width, outputs),
    )


def load(samples: int = 2_000) -> dict[str, tuple[Tensor, Tensor]]:
    """Return noisy 8 x 8 pictures of a bar in one of eight rows, which is the class."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(8, (samples,), generator=generator)
    pictures = torch.randn(samples, 8, 8, generator=generator)
    pictures[torch.arange(samples), rows] += 1.0
    cut = samples * 8 // 10
    return {
        "train": (pictures[:cut], rows[:cut]),
        "test": (pictures[cut:], rows[cut:]),
    }


def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the sum of the samples' losses, and a count by its name."""
    total = functional.cross_entropy(outputs, targets, reduction="sum")
    near = (outputs.argmax(dim=1) - targets).abs() <= 1
    return total, {"nearly_right": near.sum()}
