"""The gradients that all micro-batches of a global batch see between two meetings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.errors import OwnCodeError


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Gradients:
    """Those of the global batch, which every micro-batch may change in the same way.

    For example it clips them. They are changed once, however the
    micro-batches are divided, so each gets a copy.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Begin with what is in `grad`."""
        self._parameters = parameters
        self.take()

    def take(self) -> None:
        """Take what is in `grad` for the gradients of now."""
        self.now = [parameter.grad for parameter in self._parameters]
        self._left: list[Tensor | None] | None = None
        """What the micro-batches have made of them."""
        self._changed: set[int] = set()
        """Which of them they have changed, perhaps in place."""

    def give(self, copy: bool = False) -> None:
        """Write the gradients of now, or copies of them, to `grad`."""
        for parameter, gradient in zip(self._parameters, self.now, strict=True):
            if copy and gradient is not None:
                gradient = gradient.clone()
            parameter.grad = gradient
        self._given = [parameter.grad for parameter in self._parameters]
        self._versions = [_version(gradient) for gradient in self._given]

    def add(self, found: int) -> None:
        """Add the gradients of now to those in `grad`, where any were found.

        Bit i of `found` says so of parameter i: elsewhere `grad` is zero.
        """
        for i, (parameter, now) in enumerate(
            zip(self._parameters, self.now, strict=True)
        ):
            if not found >> i & 1:
                parameter.grad = now
            elif now is not None and parameter.grad is not None:
                parameter.grad = now + parameter.grad

    def note(self) -> None:
        """Note what a micro-batch has left in `grad`. Raises OwnCodeError."""
        left = [parameter.grad for parameter in self._parameters]
        for i, gradient in enumerate(left):
            same = gradient is self._given[i]
            if same and _version(gradient) == self._versions[i]:
                left[i] = self.now[i]
            else:
                self._changed.add(i)
        if self._left is None:
            self._left = left
        elif not all(map(_are_same, left, self._left)):
            raise OwnCodeError(DIFFER)

    def settle(self) -> None:
        """Take what the micro-batches have left for the gradients of now."""
        if self._left is not None:
            self.now, self._left = self._left, None
            self._changed.clear()

    def changes(self) -> int:
        """Return a sum over the bits of what was changed; 0 if nothing was."""
        left, changed = self._left or self.now, 0
        for i in self._changed:
            gradient = left[i]
            bits = 0 if gradient is None else int(_bits(gradient).sum())
            changed += (i + 1) * (2 * bits + 1)
        return changed


DIFFER = (
    "The micro-batches of one global batch have changed the gradients differently, so "
    "there is no common step. Compute gradients by `self.manual_backward`, and change "
    "them by nothing that depends on samples or random numbers."
)


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


def _bits(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    return dense.detach().view(BITS[dense.dtype.itemsize])


def _are_same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None or left is right:
        return left is right
    return torch.equal(_bits(left), _bits(right))
