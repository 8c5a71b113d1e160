"""How samples reach a program: as bytes that it gathers, as floats, or as tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.core.metric import Metric
from samestep.data.augment import NONE, Mixed
from samestep.data.dataset import Dataset
from samestep.data.sources.rows import ByteRows, byte_rows
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.program import Buffer, Op, Program


Numbers = NDArray[np.int64]


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

    def load(self, execution: Execution, samples: Numbers) -> None:
        """Let the next call compute samples int64 [n], with their targets."""
        rows, size = self.rows, len(samples)
        if rows.members is not None:
            samples = rows.members[samples]
        execution.indices[:size] = samples
        execution.call.bytes = rows.address
        targets = rows.targets[samples]
        if rows.targets.ndim == 1:
            execution.labels[:size] = targets
        else:
            execution.bind(targets=torch.from_numpy(targets))


def joined(targets: Sequence[Tensor | Mixed]) -> Tensor | Mixed:
    """Return the targets of several micro-batches as those of one."""
    if not any(isinstance(part, Mixed) for part in targets):
        return torch.cat([part for part in targets if isinstance(part, Tensor)])
    # A micro-batch without samples has plain targets, which are none.
    mixed = [part.parts for part in targets if isinstance(part, Mixed)]
    return Mixed(*(torch.cat(parts) for parts in zip(*mixed, strict=True)))


def type_of(data: Dataset) -> torch.dtype:
    """Return the type of a data set's only input: float32, or int64 for tokens."""
    inputs, _ = data.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    is_float = isinstance(inputs, Tensor) and inputs.is_floating_point()
    return torch.float32 if is_float else torch.int64


def load_samples(execution: Execution, inputs: Tensor, targets: Tensor | Mixed) -> None:
    """Let the next call compute inputs [n, ...], with their targets.

    Inputs are floats, or tokens (int64).
    """
    inputs = inputs.flatten(1).contiguous()
    if inputs.is_floating_point():
        execution.bind(inputs=inputs)
    else:
        execution.bind(tokens=inputs.long())
    if isinstance(targets, Mixed):
        targets, partners, shares = targets.parts
        execution.bind(partners=partners.contiguous(), shares=shares.contiguous())
    if targets.is_floating_point():
        execution.bind(targets=targets.contiguous())
    else:
        execution.labels[: targets.numel()] = targets.flatten().numpy()


def cells_of(
    metrics: tuple[Metric, ...], loss: float, measured: float, counted: int
) -> list[float]:
    """Return the cells of a micro-batch, as `Objective.forward` gives them.

    A loss that ignores targets has four: its sum, how many count, how many of these
    are right, and again how many count.
    """
    return [loss, counted, measured, counted] if metrics else [measured]


def num_counted(labels: Numbers, ignored: int) -> int:
    """Return how many labels are not ignored."""
    return int(np.count_nonzero(labels != ignored))
