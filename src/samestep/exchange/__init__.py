"""How the partial gradients of the workers become one sum."""

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from samestep.core.gradient_noise import Watch


class Merger(Protocol):
    """Workers that compare notes."""

    workers: int

    def merge(self, values: Tensor) -> Tensor:
        """float64 cells that only one worker has filled, from each; in place."""


class Exchange(Merger, Protocol):
    """What the training needs of an exchange; all workers make the same calls.

    In every step: `accumulate` and `after_backward` around each own micro-batch, then
    `sum`, the update of the own slice, `all_gather_parameters`.
    """

    parameters: Tensor
    """[size]: the vector that the model's parameters are views of."""
    owned: tuple[int, int]
    """The slice of the vector that this worker updates."""
    states: list[Tensor]
    """The optimizer's state over that slice, zeroed."""
    watch: Watch
    """Is shown the gradient of every own micro-batch, in steps that are watched."""
    bytes_per_step: int
    """That all workers together read of each other's memory or receive."""
    network_bytes_per_step: int
    """The part of them that goes from one node to another."""

    def assign(self, shares: list[tuple[int, int]]) -> None:
        """Between two steps: from now on, each worker owns these micro-batches."""

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """Binds the model to the parameters; returns the module to call.

        `overlap` says that every backward pass reaches each parameter once, so that
        gradients may be sent while others are computed.
        """

    def accumulate(self, leaf: int) -> AbstractContextManager[None]:
        """The context of the forward and backward pass of one micro-batch."""

    def after_backward(self, leaf: int) -> None:
        """After the backward pass."""

    def sum(self) -> tuple[Tensor, Tensor]:
        """The gradient over the own slice and the sum of the buffers [tail]."""

    def all_gather_parameters(self) -> None:
        """After the update."""

    def merge_slices(self, values: Tensor) -> Tensor:
        """float64 cells, each filled by all workers that update its slice; in place."""
