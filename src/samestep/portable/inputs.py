"""How samples reach a program: as bytes that it gathers, as floats, or as tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from samestep.core.metric import Metric
from samestep.data import pytree
from samestep.data.augment import NONE, Mixed
from samestep.data.dataset import Dataset
from samestep.data.pytree import Nested
from samestep.data.sources.rows import ByteRows, byte_rows
from samestep.errors import NotPortable
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.program import Buffer, Op, Program
from samestep.kernels.trace import Inputs, Kind


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


def kinds_of(data: Dataset) -> Inputs:
    """Return what the model of a data set takes."""
    sample, _ = data.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    structure = pytree.apply(lambda _: None, sample)

    def call(module: nn.Module, tensors: list[Tensor]) -> Any:
        return pytree.call(module, pytree.restore(structure, iter(tensors)))

    kinds = (Kind(tuple(t.shape[1:]), t.dtype) for _, t in pytree.leaves(sample))
    return Inputs(tuple(kinds), call)


def together(batches: Sequence[Nested]) -> Nested:
    """Return the inputs of several micro-batches as those of one, in a tuple.

    Raises NotPortable if their shapes differ.
    """
    leaves = [[tensor for _, tensor in pytree.leaves(given)] for given in batches]
    for tensors in zip(*leaves, strict=True):
        for tensor in tensors:
            _check_size(tensor, math.prod(tensors[0].shape[1:]))
    return tuple(torch.cat(tensors) for tensors in zip(*leaves, strict=True))


def load_samples(execution: Execution, inputs: Nested, targets: Tensor | Mixed) -> None:
    """Let the next call compute inputs [n, ...], with their targets.

    Raises NotPortable for inputs of another shape than those that were recorded.
    """
    columns: dict[bool, list[Tensor]] = {True: [], False: []}
    loads = execution.program.ops
    for (_, tensor), op in zip(pytree.leaves(inputs), loads, strict=False):
        _check_size(tensor, op.i[2])
        columns[tensor.is_floating_point()].append(tensor.flatten(1))
    if columns[True]:
        execution.bind(inputs=_beside(columns[True]))
    if columns[False]:
        execution.bind(tokens=_beside([part.long() for part in columns[False]]))
    if isinstance(targets, Mixed):
        targets, partners, shares = targets.parts
        execution.bind(partners=partners.contiguous(), shares=shares.contiguous())
    if targets.is_floating_point():
        execution.bind(targets=targets.contiguous())
    else:
        execution.labels[: targets.numel()] = targets.flatten().numpy()


def _beside(columns: list[Tensor]) -> Tensor:
    """Return matrices [n, ...] side by side; the only one is not copied."""
    return (torch.cat(columns, 1) if columns[1:] else columns[0]).contiguous()


def _check_size(tensor: Tensor, size: int) -> None:
    """Raise NotPortable unless every sample has `size` numbers."""
    if len(tensor) and tensor[0].numel() != size:
        raise NotPortable(
            "Portable arithmetic records a model with the shape of the first sample, "
            f"{size} numbers; now a sample has {tensor[0].numel()}: pad all samples to "
            'one length, or set `arithmetic = "torch"`.'
        )


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
