"""Partial gradients of 16 bits, which take half the bytes on their way to others.

With `compression` in the recipe, the gradient of every micro-batch, and every sum in
the canonical tree (`samestep.core.tree`), is rounded to the nearest number of that type
after it was computed in float32. So every partial that is sent has 16 bits already, and
sending it as such changes nothing: the result depends on the tree, not on which workers
exchange which partials.

| type | range | relative error |
|---|---|---|
| bf16 | that of float32 | at most 2^-9 |
| fp16 | 65,504; below 6e-5 it loses precision, below 3e-8 all | at most 2^-12 |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.errors import NonFiniteGradient


DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compression:
    """Rounds gradients to the type that the recipe's `compression` names."""

    dtype: torch.dtype | None = None
    """None: nothing is rounded."""

    @classmethod
    def of(cls, compression: str) -> "Compression":
        """Return the compression of the recipe's field."""
        return cls(DTYPES[compression])

    @property
    def is_exact(self) -> bool:
        """Whether it changes nothing."""
        return self.dtype is None

    def sent_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the type in which a rounded gradient of `dtype` loses nothing."""
        return self.dtype or dtype

    def __call__(self, values: Tensor) -> Tensor:
        """Round values [...] in place, and return them."""
        return values if self.dtype is None else values.copy_(values.to(self.dtype))

    def add(self, left: Tensor, right: Tensor) -> Tensor:
        """Return the rounded sum of two nodes of the tree, written into `left`."""
        return self(left.add_(right))

    def check(self, total: Tensor) -> None:
        """Raise NonFiniteGradient if the sum over all micro-batches has overflowed.

        A value that overflows in any node is still infinite, or NaN, in the sum. Other
        types have the range of float32: there, the check of the loss is enough.
        """
        if self.dtype is torch.float16 and not total.isfinite().all():
            raise NonFiniteGradient(
                'With `compression = "fp16"` gradients are at most 65,504, and a sum '
                'of them became infinite or NaN. Use `compression = "bf16"`, which has '
                "the range of float32, or lower `optimizer.lr` if the loss grows."
            )


EXACT = Compression()
