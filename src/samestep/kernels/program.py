"""A program: the operations of a step on numbered buffers, as data.

`csrc/operations.h` says what each operation does and what its numbers mean.
"""

import hashlib
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samestep.kernels.interface import OpFlag, OpKind


PANEL = 32
"""Columns of a panel, in which activations are stored."""
ALIGNMENT = 64
"""Bytes to whose multiples buffers are aligned: a cache line."""
OPERATION = np.dtype(
    [("kind", "<i4"), ("flags", "<i4"), ("i", "<i8", 36), ("f", "<f4", 4)]
)
CONSTANTS = 1 << 40
"""The first place of a constant; smaller ones are places in the parameters."""
NONE = -1
NO_FLAGS = OpFlag(0)


READS: dict[OpKind, tuple[int, ...]] = {
    OpKind.GATHER_BYTES: (4, 5),
    OpKind.LOAD: (),
    OpKind.TRANSPOSE: (0,),
    OpKind.LINEAR: (0,),
    OpKind.LINEAR_GRAD_INPUT: (0, 5),
    OpKind.LINEAR_GRAD_WEIGHT: (0, 1),
    OpKind.GRAD_BIAS: (0,),
    OpKind.BATCH_NORM: (0,),
    OpKind.BATCH_NORM_GRAD: (0, 2, 3, 4),
    OpKind.CROSS_ENTROPY: (0,),
    OpKind.SQUARED_ERROR: (0,),
    OpKind.ACTIVATE: (0,),
    OpKind.GATE: (0, 2),
    OpKind.STORE: (0,),
    OpKind.MAX_POOL: (0,),
    OpKind.MAX_POOL_GRAD: (0, 2),
    OpKind.MEAN_POOL: (0,),
    OpKind.MEAN_POOL_GRAD: (0,),
    OpKind.BATCH_NORM_2D: (0, 10),
    OpKind.BATCH_NORM_2D_GRAD: (0, 2, 3, 4, 5),
    OpKind.ATTENTION: (0, 5, 10),
    OpKind.ATTENTION_GRAD: (0, 5, 10, 15, 16, 17),
    OpKind.CONV: (0,),
    OpKind.CONV_GRAD_INPUT: (0, 16),
    OpKind.CONV_GRAD_WEIGHT: (0, 1, 18),
    OpKind.CONV_MAX_POOL: (0,),
    OpKind.SUM_ROWS: (0,),
    OpKind.UNARY: (0,),
    OpKind.BINARY: (0, 2),
    OpKind.MATMUL: (0, 2),
    OpKind.SOFTMAX: (0,),
    OpKind.ADD_LEAVES: (0,),
    OpKind.LAYER_NORM: (0,),
    OpKind.LAYER_NORM_GRAD: (0, 2, 3, 4),
    OpKind.LOAD_TOKENS: (),
    OpKind.EMBEDDING: (0,),
    OpKind.EMBEDDING_GRAD: (0, 1),
    OpKind.MEASURE: (0,),
    OpKind.PICK: (0, 2),
    OpKind.PICK_GRAD: (0, 2),
    OpKind.DRAW: (),
    OpKind.COMBINE: (0,),
    **dict.fromkeys((OpKind.LSTM, OpKind.GRU, OpKind.RNN), (0, 8, 9)),
    **dict.fromkeys(
        (OpKind.LSTM_GRAD, OpKind.GRU_GRAD, OpKind.RNN_GRAD), (0, 1, 2, 3, 9, 10)
    ),
}
"""Which of an operation's numbers are buffers that it reads."""
WRITES: dict[OpKind, tuple[int, ...]] = {
    OpKind.GATHER_BYTES: (0, 1),
    OpKind.LOAD: (0, 1),
    OpKind.BATCH_NORM: (1, 2, 3),
    OpKind.LINEAR_GRAD_WEIGHT: (),
    OpKind.GRAD_BIAS: (),
    OpKind.STORE: (),
    OpKind.ADD_LEAVES: (),
    OpKind.LAYER_NORM: (1, 2, 3),
    OpKind.LAYER_NORM_GRAD: (1, 5),
    OpKind.MAX_POOL: (1, 2),
    OpKind.BATCH_NORM_2D: (1, 2, 3),
    OpKind.BATCH_NORM_2D_GRAD: (1, 6),
    OpKind.ATTENTION: (15, 16, 25),
    OpKind.ATTENTION_GRAD: (22, 23, 24, 25),
    OpKind.CONV_GRAD_WEIGHT: (17,),
    OpKind.CONV_MAX_POOL: (1, 18, 19),
    OpKind.LOAD_TOKENS: (0,),
    OpKind.DRAW: (0,),
    OpKind.EMBEDDING_GRAD: (9, 10),
    **dict.fromkeys((OpKind.LSTM, OpKind.GRU, OpKind.RNN), (0, 1, 2, 3)),
    **dict.fromkeys(
        (OpKind.LSTM_GRAD, OpKind.GRU_GRAD, OpKind.RNN_GRAD), (1, 3, 4, 9, 10)
    ),
}
"""And which it writes; by default the second."""


def room(rows: int, terms: int) -> int:
    """Return the elements that packed weights of a recurrent layer need, `ROOM`."""
    return ((rows + 16) * terms + 31) // 16 * 16


@dataclass
class Op:
    """One operation."""

    kind: OpKind
    i: list[int]
    f: list[float] = field(default_factory=list)
    flags: OpFlag = NO_FLAGS

    @property
    def reads(self) -> list[int]:
        """The buffers that it reads."""
        places = READS[self.kind]
        if self.flags & OpFlag.MASKED:
            places = (*places, 30)
        return [self.i[k] for k in places if self.i[k] >= 0]

    @property
    def writes(self) -> list[int]:
        """The buffers that it writes."""
        places = WRITES.get(self.kind, (1,))
        if self.flags & OpFlag.LEAVES:
            places = (*places, 29)
        return [self.i[k] for k in places if self.i[k] != NONE]


@dataclass(frozen=True)
class Buffer:
    """Room for one matrix of activations, or a constant."""

    features: int
    is_by_sample: bool = False
    """Whether it is [samples, features], in panels of 32 features."""
    is_by_micro_batch: bool = False
    """Whether it is [micro-batches, features], for statistics."""
    constant: tuple[float, ...] = ()
    positions: int = 1
    """By sample: how many matrices [samples, features], one under the other."""
    is_room: bool = False
    """Whether it has `features` elements for any samples: room for a kernel."""

    def size(self, capacity: int, micro_batches: int) -> int:
        """Return its elements, for `capacity` samples, a multiple of 32."""
        if self.constant:
            return len(self.constant)
        if self.is_room:
            return self.features
        if self.is_by_micro_batch:
            return micro_batches * self.features
        panels = -(-self.features // PANEL) if self.is_by_sample else capacity // PANEL
        columns = capacity * self.positions if self.is_by_sample else self.features
        return panels * PANEL * columns


@dataclass(frozen=True)
class Program:
    """Operations in the order of their execution, and the buffers they work on."""

    ops: tuple[Op, ...]
    buffers: tuple[Buffer, ...]
    num_loads: int = 0
    """How many operations get the samples; the first ones."""
    num_forward: int = 0
    """How many more are the forward pass, with the loss; the rest is the backward."""
    has_draws: bool = False
    mask_dims: tuple[int, ...] = ()
    """For each dropout, which dimension of its mask the samples are."""
    positions: int = 1
    """How many targets a sample has."""
    constants: Tensor | None = field(default=None, compare=False)
    """What training does not change, float32 [n]; its places begin at CONSTANTS."""
    cells: int = 0
    """How many numbers a loss of the user's own measures, itself first; 0: built in."""
    num_weights: int = 0
    """How many operations at the end are gradients of matrices, and nothing else."""

    def encoded(self) -> NDArray[np.void]:
        """Return the operations as the kernels read them, OPERATION [ops]."""
        array = np.zeros(len(self.ops), OPERATION)
        for row, op in zip(array, self.ops, strict=True):
            row["kind"], row["flags"] = op.kind, op.flags
            row["i"][: len(op.i)] = op.i
            row["f"][: len(op.f)] = op.f
        return array

    @property
    def sha256(self) -> str:
        """The SHA-256 of its operations and buffers."""
        digest = hashlib.sha256(self.encoded().tobytes() + repr(self.buffers).encode())
        if self.constants is not None:
            digest.update(self.constants.numpy().tobytes())
        return digest.hexdigest()

    def with_load(self, load: Op, constants: Sequence[Buffer] = ()) -> "Program":
        """Return the program with another operation that gets the samples.

        Its first two numbers are set to the buffers of the inputs; `constants` are
        appended to the buffers, and numbered from the last one on.
        """
        first = self.ops[0]
        op = replace(load, i=[*first.i[:2], *load.i[2:]])
        return replace(
            self, ops=(op, *self.ops[1:]), buffers=(*self.buffers, *constants)
        )

    def with_weights_last(self, samples: int) -> "Program":
        """Return the program with gradients of matrices at its end, if they may wait.

        What they read is kept until then. Those stay where they are for which a step's
        `samples` make more numbers than the matrix has, to which others are added, or
        whose inputs are overwritten later.
        """
        last = []
        written = {buffer: n for n, op in enumerate(self.ops) for buffer in op.writes}
        for number, op in enumerate(self.ops):
            if op.kind != OpKind.LINEAR_GRAD_WEIGHT or op.flags & OpFlag.LEAVES:
                continue
            inputs, outputs, _, positions = op.i[2:6]
            is_small = samples * positions * (inputs + outputs) <= inputs * outputs
            if is_small and all(written.get(b, 0) <= number for b in op.reads):
                last.append(number)
        order = sorted(range(len(self.ops)), key=set(last).__contains__)
        ops = tuple(self.ops[n] for n in order)
        return replace(self, ops=ops, num_weights=len(last))


def places(program: Program, capacity: int, micro_batches: int) -> list[int]:
    """Return where each buffer lies in one workspace, in bytes; its size comes last.

    Buffers that are not in use at the same time may overlap.
    """
    memory, found, total = Memory(), dict[int, int](), 0
    sizes = [4 * b.size(capacity, micro_batches) for b in program.buffers]
    for op, ended in zip(program.ops, _last_uses(program), strict=True):
        for buffer in (*op.reads, *op.writes):
            if buffer not in found:
                found[buffer] = memory.take(sizes[buffer])
                total = max(total, found[buffer] + sizes[buffer])
        for buffer in ended:
            memory.give_back(found[buffer], sizes[buffer])
    return [*(found.get(buffer, 0) for buffer in range(len(sizes))), total]


def _last_uses(program: Program) -> list[list[int]]:
    """Return the buffers that each operation is the last to use; constants are kept."""
    last: dict[int, int] = {}
    for number, op in enumerate(program.ops):
        last |= dict.fromkeys((*op.reads, *op.writes), number)
    uses: list[list[int]] = [[] for _ in program.ops]
    for buffer, number in last.items():
        if not program.buffers[buffer].constant:
            uses[number].append(buffer)
    return uses


class Memory:
    """A memory without an end, of which the first free part that suffices is taken."""

    def __init__(self) -> None:
        self._free = [(0, 1 << 62)]
        """Where free parts begin and end, in order."""

    def take(self, size: int) -> int:
        """Return the place of `size` bytes; it is aligned."""
        size = _aligned(size)
        number = next(n for n, (a, b) in enumerate(self._free) if b - a >= size)
        start, end = self._free[number]
        left = (start + size, end)
        self._free[number : number + 1] = [left] if start + size < end else []
        return start

    def give_back(self, start: int, size: int) -> None:
        """Make what was taken free again."""
        end = start + _aligned(size)
        number = bisect(self._free, (start, end))
        if self._free[number][0] == end:
            end = self._free.pop(number)[1]
        if number and self._free[number - 1][1] == start:
            number -= 1
            start = self._free.pop(number)[0]
        self._free.insert(number, (start, end))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
