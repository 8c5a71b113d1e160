"""Random changes of training samples, the same wherever they are computed.

How a sample is changed depends only on the recipe's seed, the epoch and the number of
the sample, not on the worker. (Mixup also takes another sample of the micro-batch,
which the recipe fixes.)
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from samestep.config.data import Augment
from samestep.core.plan import derive_seed
from samestep.core.powers import powers
from samestep.core.splitmix import GOLDEN, Numbers, mix
from samestep.data.pytree import Nested, describe
from samestep.errors import RecipeError


@dataclass(frozen=True)
class Mixed:
    """Targets of mixed samples: `first` for `share` of the sample, else `second`."""

    first: Tensor
    """int64 [b]"""
    second: Tensor
    """int64 [b]"""
    share: Tensor
    """[b], at least 1/2, of the inputs' dtype"""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """All three tensors."""
        return self.first, self.second, self.share

    def to(self, device: torch.device) -> "Mixed":
        """Return the targets on a device."""
        return Mixed(*(part.to(device) for part in self.parts))


@dataclass(frozen=True)
class Augmentation:
    """The changes of the section `[data.augment]`."""

    section: Augment
    seed: int

    @classmethod
    def of(cls, section: Augment, seed: int, sample: Nested) -> "Augmentation":
        """Return the changes, checked for inputs like `sample` [1, ...].

        Raises RecipeError.
        """
        moves = section.shift or section.crop or section.flip
        if (
            not isinstance(sample, Tensor)
            or not sample.is_floating_point()
            or (moves and sample.dim() != 4)
        ):
            raise RecipeError(
                "Augmentation takes one input of floats per sample, and to shift, crop "
                "or flip, images [n, channels, height, width]; the first sample of "
                f"these data is {describe(sample)}. Leave out `data.augment`, or do it "
                "in a data set of your own."
            )
        if moves and max(section.shift, section.crop) >= min(sample.shape[2:]):
            raise RecipeError(
                "An image is moved by less than its size; `data.augment.shift` or "
                f"`crop` is {max(section.shift, section.crop)}, the size "
                f"{list(sample.shape[2:])}."
            )
        return cls(section, seed)

    def apply(
        self, inputs: Tensor, targets: Tensor, samples: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor | Mixed]:
        """Change floats [b, ...] and targets of the samples int64 [b], for an epoch."""
        section, key = self.section, derive_seed(self.seed, "augment", epoch)
        if len(samples) == 0:
            return inputs, targets
        draws = Draws(np.uint64(key), samples.numpy().astype(np.uint64))
        for margin, mode in ((section.crop, "reflect"), (section.shift, "constant")):
            if margin:
                padded = functional.pad(inputs, [margin] * 4, mode=mode)
                inputs = _windows(padded, draws, margin, inputs)
        if section.flip:
            flipped = torch.from_numpy(draws.uniform() < section.flip)
            inputs = torch.where(flipped.view(-1, 1, 1, 1), inputs.flip(3), inputs)
        if section.mixup:
            return _mixed(inputs, targets, draws, section.mixup)
        return inputs, targets


NONE = Augmentation(Augment(), 0)


class Draws:
    """Random numbers for samples [b]: each call draws the next one for all of them."""

    def __init__(self, key: np.uint64, samples: Numbers) -> None:
        self.size = len(samples)
        self._states = mix(mix(samples) ^ key)

    def numbers(self) -> Numbers:
        """Draw uint64 [b]."""
        self._states = self._states + GOLDEN
        return mix(self._states)

    def uniform(self) -> NDArray[np.float64]:
        """Draw float64 [b] in [0, 1), multiples of 2**-53."""
        return (self.numbers() >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, end: int) -> Tensor:
        """Draw int64 [b] from 0 to `end` - 1."""
        return torch.from_numpy((self.uniform() * end).astype(np.int64))


def _windows(padded: Tensor, draws: Draws, margin: int, like: Tensor) -> Tensor:
    """Cut a window of the original size out of each padded image, at a drawn place."""
    size, channels, height, width = like.shape
    top, left = draws.below(2 * margin + 1), draws.below(2 * margin + 1)
    rows = (top.view(-1, 1) + torch.arange(height)).view(size, 1, height, 1)
    columns = (left.view(-1, 1) + torch.arange(width)).view(size, 1, 1, width)
    images = torch.arange(size).view(-1, 1, 1, 1)
    return padded[images, torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def _mixed(
    inputs: Tensor, targets: Tensor, draws: Draws, alpha: float
) -> tuple[Tensor, Mixed]:
    """Mix each sample with the next of the micro-batch: mixup (Zhang et al. 2018).

    Each sample has the larger share of its own mixture, so that accuracy stays well
    defined. The order of the samples is random, and so is the neighbour.
    """
    share = torch.tensor(_beta(draws, alpha), dtype=inputs.dtype)
    wide = share.view(-1, *[1] * (inputs.dim() - 1))
    mixed = inputs * wide + inputs.roll(-1, 0) * (1 - wide)
    return mixed, Mixed(targets, targets.roll(-1, 0), share)


def _beta(draws: Draws, alpha: float) -> list[float]:
    """Draw x from Beta(alpha, alpha), 0 < alpha <= 1; return max(x, 1 - x) [b].

    By rejection (Joehnk 1964): at least half of the tries succeed.
    """
    shares: dict[int, float] = {}
    while len(shares) < draws.size:
        drawn = (powers(draws.uniform(), 1 / alpha).tolist() for _ in range(2))
        for index, (x, y) in enumerate(zip(*drawn, strict=True)):
            if index not in shares and x + y <= 1:  # both 0: too small for a float
                shares[index] = max(x, y) / (x + y) if x + y else 1.0
    return [shares[index] for index in range(draws.size)]
