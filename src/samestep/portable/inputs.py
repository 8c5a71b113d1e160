"""How samples reach a program: as bytes that it gathers, or as floats."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.core.metric import Metric
from samestep.data.augment import NONE
from samestep.data.dataset import Dataset
from samestep.data.sources.rows import ByteRows, byte_rows
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.program import Buffer, Op, Program


def inputs_of(data: Dataset, split: str, in_training: bool) -> "ByteInputs | None":
    """Return the bytes of a split; None if its samples must be drawn as floats."""
    if in_training and data.augmentation != NONE:
        return None
    rows = byte_rows(data.splits[split])
    return None if rows is None else ByteInputs(rows)


@dataclass(frozen=True)
class ByteInputs:
    """Bytes in memory, which the program gathers and normalises by itself."""

    rows: ByteRows

    def adapted(self, program: Program) -> Program:
        """Return the program with the operation that takes these inputs."""
        scale, offset = (part.flatten().tolist() for part in self.rows.normal)
        number, features = len(program.buffers), program.ops[0].i[2]
        i = [0, 0, features, len(scale), number, number + 1]
        constants = [Buffer(0, constant=tuple(values)) for values in (scale, offset)]
        return program.with_load(Op(OpKind.GATHER_BYTES, i), constants)

    def bind(self, execution: Execution, samples: Tensor) -> Tensor:
        """Let the next call compute samples int64 [n]; return their targets."""
        rows = self.rows
        if rows.members is not None:
            samples = rows.members[samples]
        execution.bind(indices=samples)
        execution.call.bytes = rows.address
        return rows.targets[samples]


def bind_floats(execution: Execution, inputs: Tensor) -> None:
    """Let the next call compute inputs [n, ...]."""
    execution.bind(inputs=inputs.flatten(1).contiguous())


def bind_targets(execution: Execution, targets: Tensor) -> None:
    """Compare with int64 labels [n], or with floats [n, values]."""
    if targets.is_floating_point():
        execution.bind(targets=targets.contiguous())
    else:
        execution.bind(labels=targets.contiguous())


def cells_of(
    metrics: tuple[Metric, ...], loss: float, measured: float, counted: int
) -> list[float]:
    """Return the cells of a micro-batch, as `Objective.forward` gives them.

    A loss that ignores targets has four: its sum, how many count, how many of these
    are right, and again how many count.
    """
    return [loss, counted, measured, counted] if metrics else [measured]


def exact_sum(values: Tensor) -> float:
    """Return the sum of float64 [n], rounded once: no order changes it."""
    return math.fsum(values.tolist())


def num_counted(targets: Tensor, ignored: int) -> int:
    """Return how many targets are not ignored."""
    return int(torch.count_nonzero(targets != ignored))
