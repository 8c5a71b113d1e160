"""The model's parameters as views of one vector, and its buffers between the steps.

    [ parameter | padding | parameter | padding | ... ][ floating-point buffers ]
      <-------------- `size`, a multiple of BLOCK ---->  <------ `tail` ------->

A vector of this layout also holds a gradient; its tail then holds what a forward pass
made of the buffers (BatchNorm's running statistics). Padding is zero and stays so.
"""

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from samestep.plan import pieces


ALIGNMENT = 16
"""Parameters start at multiples of so many float32: a cache line."""
BLOCK = 1024
"""Slices of the vector are cut at multiples of so many elements."""


class Flat:
    """The layout of one model; float32 parameters and buffers only."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._buffers = [b for b in model.buffers() if b.is_floating_point()]
        self._counters = [b for b in model.buffers() if not b.is_floating_point()]
        sizes = [_round_up(p.numel(), ALIGNMENT) for p in self.parameters]
        self._offsets = [0, *accumulate(sizes)]
        self.size = _round_up(self._offsets[-1], BLOCK)
        self.tail = sum(buffer.numel() for buffer in self._buffers)
        self._saved = [buffer.clone() for buffer in self._buffers]
        self._counts = [int(counter) for counter in self._counters]

    def slices(self, workers: int) -> list[tuple[int, int]]:
        """The part of the vector that each worker updates."""
        cuts = [BLOCK * cut for cut in pieces(self.size // BLOCK, workers)]
        return list(pairwise(cuts))

    def views(self, vector: Tensor) -> list[Tensor]:
        """[size + tail] or [size] -> one view per parameter, of its shape."""
        return [
            vector[offset : offset + parameter.numel()].view_as(parameter)
            for offset, parameter in zip(self._offsets, self.parameters, strict=False)
        ]

    def bind(self, vector: Tensor, write: bool) -> None:
        """Makes the parameters views of `vector` [size]; first writes them there."""
        for parameter, view in zip(self.parameters, self.views(vector), strict=True):
            if write:
                view.copy_(parameter.data)
            parameter.data = view

    def read_buffers(self) -> Tensor:
        """The buffers as a forward pass left them: [tail]."""
        return torch.cat([torch.empty(0), *(b.view(-1) for b in self._buffers)])

    def reset_buffers(self) -> None:
        """To their values before the step: every micro-batch starts from these."""
        for buffer, saved in zip(self._buffers, self._saved, strict=True):
            buffer.copy_(saved)
        for counter, count in zip(self._counters, self._counts, strict=True):
            counter.fill_(count)

    def advance_buffers(self, total: Tensor, micro_batches: int, updates: int) -> None:
        """Sums over micro-batches [tail] -> their means; integers count `updates`."""
        if not self.tail:
            return
        means = torch.split(total / micro_batches, [b.numel() for b in self._saved])
        for saved, mean in zip(self._saved, means, strict=True):
            saved.copy_(mean.view_as(saved))
        self._counts = [count + updates for count in self._counts]
        self.reset_buffers()


def block_norms(gradient: Tensor) -> Tensor:
    """[n], n a multiple of BLOCK -> float64 [n / BLOCK], squared L2 norms of blocks."""
    blocks = gradient.view(-1, BLOCK).double()
    return (blocks * blocks).sum(dim=1)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
