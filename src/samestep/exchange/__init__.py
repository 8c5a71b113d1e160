"""How the partial gradients of the workers become one sum.

Imports `models` and below.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from samestep.core.gradient_noise import Watch


@dataclass(frozen=True)
class Summands:
    """A sum over all micro-batches that has not been taken yet."""

    leaves: list[Tensor]
    """Partials over the own slice."""
    order: list[int]
    """In postfix: n adds leaf n to a stack, -1 replaces the top two by their sum."""


@dataclass(frozen=True)
class Room:
    """Memory that all workers of a training can read, one piece for each."""

    pieces: Tensor
    """uint8 [workers, n]"""
    own: int
    """Which of them this worker writes."""


class Merger(Protocol):
    """Adds up numbers of all workers."""

    workers: int

    def merge(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from the one worker that has it.

        In place: every cell is zero but on that worker, so that adding is exact.
        """


def gather_cells(
    exchange: Merger, rank: int, cells: Sequence[float]
) -> list[list[float]]:
    """All workers: return the cells of each of them, equally many, by rank."""
    every = torch.zeros(exchange.workers, len(cells), dtype=torch.float64)
    every[rank] = torch.tensor(cells, dtype=torch.float64)
    merged: list[list[float]] = exchange.merge(every).tolist()
    return merged


class Exchange(Merger, Protocol):
    """Sums gradients over all workers, which all make the same calls.

    In every step: `accumulate` and `after_backward` around each own micro-batch, then
    `sum`, the update of the own slice, `all_gather_parameters`. A step that was given
    up before `sum`, on all workers, leaves nothing behind.
    """

    parameters: Tensor
    """[size]: the vector that the model's parameters are views of."""
    owned: tuple[int, int]
    """The slice of the vector that this worker updates."""
    is_first: bool
    """Whether no worker of a lower rank updates the same slice."""
    states: list[Tensor]
    """The optimizer's state over that slice, zero at first."""
    watch: Watch
    """Gets the gradient of every own micro-batch, in steps that are watched."""
    bytes_per_step: int
    """Bytes that all workers together read from each other's memory or receive."""
    network_bytes_per_step: int
    """The part of them that goes from one node to another."""

    shares: list[tuple[int, int]]
    """The micro-batches of each worker."""

    def assign(self, shares: list[tuple[int, int]]) -> None:
        """All workers, between two steps: let each own these micro-batches."""

    def attach(self, objective: nn.Module, overlap: bool = True) -> nn.Module:
        """All workers: bind the model to the parameters; return the module to call.

        `overlap` says that every backward pass reaches each parameter once, so that
        gradients may be sent while others are computed.
        """

    def accumulate(self, micro_batch: int) -> AbstractContextManager[None]:
        """Return the context of the forward and backward pass of one micro-batch."""

    def after_backward(self, micro_batch: int) -> None:
        """Take the gradients and buffers that a micro-batch left.

        `grad` is None before the next micro-batch, and after `sum`. The exchange may
        add to the tensors that were in it.
        """

    def partials(self) -> list[Tensor]:
        """Return where to write the sums of the own micro-batches, [size + tail] each.

        One for each maximal subtree that this worker owns, from left to right: its
        gradient, then its buffers. It replaces `accumulate` and `after_backward` in a
        step whose gradients do not come from autograd.
        """

    def room(self, num_bytes: int) -> Room | None:
        """All workers: return more memory, `num_bytes` for each of them.

        None if they have none in common. What a worker wrote before `sum` or
        `summands` can be read by all from then on, until `all_gather_parameters`.
        """

    def sum(self) -> tuple[Tensor, Tensor]:
        """All workers: sum over all micro-batches, in the order of the tree.

        Returns the gradient over the own slice, and the tail [flat.tail]: the buffers,
        or what else `flat.read_tail` gave. The next step overwrites both.
        """

    def summands(self) -> tuple[Summands, Tensor]:
        """All workers: do as `sum`, but leave the last additions to the caller.

        They need no pass over memory of their own then.
        """

    def all_gather_parameters(self) -> None:
        """All workers, after the update: give every worker all parameters."""

    def merge_slices(self, values: Tensor) -> Tensor:
        """All workers: fill float64 cells, each from those that update its slice.

        In place, like `merge`; if every worker updates the whole vector, the cells are
        already complete.
        """
