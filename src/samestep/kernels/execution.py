"""Run a program: its workspace, and the call that the kernels read.

A call costs a few microseconds of Python beyond the kernels: what does not change from
step to step is prepared once.
"""

import ctypes
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.kernels.interface import Call, Kernels
from samestep.kernels.program import ALIGNMENT, OPERATION, PANEL, Program, places


T = TypeVar("T", bound=np.generic)


def _capacity(samples: int) -> int:
    return -(-samples // PANEL) * PANEL


def workspace_bytes(program: Program, samples: int, micro_batches: int) -> int:
    """Return the size of a program's workspace, wherever that begins."""
    return places(program, _capacity(samples), micro_batches)[-1] + ALIGNMENT


class Execution:
    """A program with room for its activations."""

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        samples: int,
        micro_batches: int,
        workspace: Tensor | None = None,
    ) -> None:
        """Make room for the most `samples` and `micro_batches` of one call.

        `workspace` is that room if others are to read it, of `workspace_bytes`.
        """
        self.program, self._run = program, kernels.run
        capacity = _capacity(samples)
        *starts, _ = places(program, capacity, micro_batches)
        if workspace is None:
            size = workspace_bytes(program, samples, micro_batches)
            workspace = torch.zeros(size, dtype=torch.uint8)
        self._workspace = workspace
        first = -self._workspace.data_ptr() % ALIGNMENT
        self._set_constants(first, starts)
        base = self._workspace.data_ptr() + first
        self._buffers = (ctypes.c_void_p * len(starts))(*(base + s for s in starts))
        self._ops = program.encoded()
        self.call = Call(capacity=capacity, buffers=ctypes.addressof(self._buffers))
        self.operations: int = self._ops.ctypes.data
        """The address of the operations."""
        self._address = ctypes.addressof(self.call)
        self._bound: dict[str, Tensor] = {}
        self._slots: ctypes.Array[ctypes.c_void_p] | None = None
        self._bound_slots: tuple[Tensor, ...] = ()
        if program.constants is not None:
            self.bind(constants=program.constants)
        # numpy writes a cell in 0.1 us, torch in 5.
        self.indices = self._array("indices", capacity, np.int64)
        """The rows of the bytes that are gathered, int64 [samples]."""
        cells = max(1, program.cells)
        targets = capacity * max(program.positions, cells)
        self.labels = self._array("labels", targets, np.int64)
        """int64 [samples * positions], like losses, metrics and answers."""
        self.keys = self._array("keys", micro_batches, np.uint64)
        """Keys of dropout, uint64 [micro-batches]."""
        self.losses = self._array("losses", targets, np.float32)
        """float32, after a call."""
        self.metrics = self._array("metrics", targets, np.float32)
        self.answers = self._array("answers", targets, np.int64)
        self.loss_sums = self._array("loss_sums", micro_batches * cells, np.float64)
        """float64 [micro-batches], after a call."""
        self.cell_sums = self.loss_sums.reshape(-1, cells)
        """The cells of a custom loss: float64 [micro-batches, cells]."""
        self.metric_sums = self._array("metric_sums", micro_batches, np.float64)

    def _set_constants(self, first: int, starts: Sequence[int]) -> None:
        for start, buffer in zip(starts, self.program.buffers, strict=True):
            if buffer.constant:
                values = torch.tensor(buffer.constant, dtype=torch.float32)
                place = self._workspace[first + start :][: 4 * len(values)]
                place.view(torch.float32).copy_(values)

    def _array(self, name: str, size: int, dtype: type[T]) -> NDArray[T]:
        """Return room for an array of the call, by its name there."""
        array = np.zeros(size, dtype)
        self.bind(**{name: torch.from_numpy(array)})
        return array

    def bind(self, **arrays: Tensor) -> None:
        """Use these arrays from now on, by their names in `Call`.

        They must be contiguous; they are kept alive.
        """
        for name, array in arrays.items():
            setattr(self.call, name, array.data_ptr())
        self._bound |= arrays

    def bind_micro_batches(self, starts: Tensor, merges: Tensor) -> None:
        """Say where each micro-batch begins among the samples, and where the last ends.

        `starts` is int64 [n + 1], `merges` int64 [n]: the sums that each completes in
        the canonical tree.
        """
        self.call.micro_batches = len(merges)
        self.bind(starts=starts, merges=merges)

    def bind_slots(self, slots: Sequence[Tensor], tail: int) -> None:
        """Write the sums of gradients to these vectors, statistics from `tail` on.

        They are kept alive.
        """
        self._bound_slots = tuple(slots)
        addresses = [slot.data_ptr() for slot in slots]
        self._slots = (ctypes.c_void_p * len(slots))(*addresses)
        self.call.slots = ctypes.addressof(self._slots)
        self.call.slots_size, self.call.tail = len(slots), tail

    def run(self, first: int = 0, end: int | None = None) -> None:
        """Run the operations from `first` to before `end`."""
        end = len(self._ops) if end is None else end
        ops = self.operations + first * OPERATION.itemsize
        failed = self._run(ops, end - first, self._address)
        if failed:
            raise RuntimeError(f"The library has no operation like {failed - 1}.")
