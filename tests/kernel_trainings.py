"""A small training as a file for the runner, and the same training called by Python."""

import ctypes
import hashlib
import math
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from samestep.core.tree import num_merges
from samestep.kernels.interface import Call, OpKind, Optimizer, OptimizerKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.program import PANEL, Buffer, Op, Program
from samestep.kernels.program_file import (
    OPTIMIZER,
    Averaging,
    ProgramFile,
    Source,
    buffers_of,
    step_type,
)
from samestep.kernels.values import (
    LossOp,
    Places,
)


ROWS, FEATURES, CLASSES = 300, 49, 10
PIECES = (8, 0, 20, 1, 8)
"""The samples of the micro-batches; every fourth step has them in reverse."""
M = len(PIECES)
CAPACITY = 2 * PANEL


def perceptron() -> nn.Module:
    """Return a model with every kind of operation of an MLP."""
    return nn.Sequential(
        *(nn.Linear(FEATURES, 35), nn.BatchNorm1d(35), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(35, 20), nn.ReLU(), nn.Linear(20, CLASSES)),
    )


def training(kind: OptimizerKind = OptimizerKind.ADAM, steps: int = 20) -> ProgramFile:
    """Return a training with batch norm, dropout, clipping and averaged weights."""
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    model = perceptron()
    places, parameters, running = _flat(model)
    pieces, text = _pieces(model, places)
    size = len(parameters)
    return ProgramFile(
        **buffers_of(_program(model, places), CAPACITY, M),
        capacity=CAPACITY,
        tail=size,
        merges=np.array([num_merges(m, (0, M), M) for m in range(M)]),
        parameters=parameters,
        running=running,
        data=rng.integers(0, 256, (ROWS, FEATURES), dtype=np.uint8),
        targets=rng.integers(0, CLASSES, ROWS),
        groups=np.array([[0, 1001], [1001, size - 1001]]),
        pieces=pieces,
        text=text,
        steps=_steps(rng, kind, steps),
    )


def _flat(model: nn.Module) -> tuple[Places, NDArray[Any], NDArray[Any]]:
    parameters = dict(model.named_parameters())
    buffers = {n: b for n, b in model.named_buffers() if b.dtype == torch.float32}
    places, vectors = [], []
    for tensors in (parameters, buffers):
        starts = accumulate((t.numel() for t in tensors.values()), initial=0)
        places.append(dict(zip(tensors, starts, strict=False)))
        flat = torch.cat([t.detach().reshape(-1) for t in tensors.values()])
        vectors.append(flat.numpy())
    return Places(*places), vectors[0], vectors[1]


def _program(model: nn.Module, places: Places) -> Program:
    loss = LossOp(OpKind.CROSS_ENTROPY, smoothing=0.1)
    program = lower(model.train(), (FEATURES,), places, loss)
    first = len(program.buffers)
    gather = Op(OpKind.GATHER_BYTES, [0, 0, FEATURES, 1, first, first + 1])
    constants = [Buffer(1, constant=(1 / 79,)), Buffer(1, constant=(0.4242,))]
    return program.with_load(gather, constants)


def _pieces(model: nn.Module, places: Places) -> tuple[NDArray[Any], bytes]:
    """Return what the fingerprint of the model's state_dict consists of."""
    text, pieces = b"", []
    for name, tensor in model.state_dict().items():
        shape = ",".join(map(str, tensor.shape))
        kind = str(tensor.dtype).removeprefix("torch.")
        added = f"{name}{kind}{shape}".encode()
        if tensor.dtype != torch.float32:
            added += tensor.numpy().tobytes()
        pieces.append([Source.TEXT, len(text), len(added)])
        text += added
        if name in places.parameters:
            place = places.parameters[name]
            pieces.append([Source.PARAMETERS, place, tensor.numel()])
            pieces.append([Source.AVERAGE, place, tensor.numel()])
        elif name in places.buffers:
            pieces.append([Source.RUNNING, places.buffers[name], tensor.numel()])
    return np.array(pieces), text


def _steps(
    rng: np.random.Generator, kind: OptimizerKind, count: int
) -> NDArray[np.void]:
    steps = np.zeros(count, step_type(M, CAPACITY, 2))
    for number, step in enumerate(steps, start=1):
        pieces = PIECES if number % 4 else PIECES[::-1]
        step["starts"] = [*accumulate(pieces, initial=0)]
        samples = step["samples"] = sum(pieces)
        step["indices"][:samples] = rng.choice(ROWS, samples, replace=False)
        step["keys"] = rng.integers(0, 1 << 63, M)
        step["weight"], step["max_norm"] = 1 / samples, 0.25
        step["factor"] = 1
        step["average"] = Averaging.BEGINS if number == 1 else Averaging.MOVES
        step["average_weight"] = 0.1
        optimizers = (bytes(_optimizer(kind, number, decay)) for decay in (0.01, 0))
        step["optimizers"] = np.frombuffer(b"".join(optimizers), OPTIMIZER)
    return steps


def _optimizer(kind: OptimizerKind, step: int, decay: float) -> Optimizer:
    if kind == OptimizerKind.SGD:
        numbers = {"lr": 0.05, "weight_decay": decay, "beta1": 0.9}
        return Optimizer(kind=kind, nesterov=1, is_first=step == 1, **numbers)
    lr = 0.002
    return Optimizer(
        kind=kind,
        lr=lr / (1 - 0.9**step),
        weight_decay=1 - lr * decay if kind == OptimizerKind.ADAMW else decay,
        beta1=0.9,
        beta2=0.999,
        one_minus_beta1=0.1,
        one_minus_beta2=0.001,
        root=1 / math.sqrt(1 - 0.999**step),
        eps=1e-8,
    )


class PythonRun:
    """The training of a file, step by step through ctypes."""

    def __init__(self, file: ProgramFile, isa: str | None = None) -> None:
        """Make room for everything; `isa` is an instruction set."""
        self._file, self._kernels = file, load_kernels(isa)
        self._parameters = _room(file.parameters)
        self._running = _room(file.running)
        size = len(file.parameters)
        self._slot = np.zeros(file.tail + len(file.running), np.float32)
        self._states = np.zeros((2, size), np.float32)
        self._average = np.zeros(size, np.float32)
        self._buffers = [np.zeros(n, np.float32) for n in file.sizes]
        ends = [*accumulate(file.constant_sizes, initial=0)]
        for buffer, (start, end) in zip(self._buffers, pairwise(ends), strict=True):
            buffer[: end - start] = file.constants[start:end]
        self._losses = hashlib.sha256()

    def run(self) -> dict[str, str]:
        """Return the SHA-256 of the weights and of the losses, as the runner does."""
        for step in self._file.steps:
            self._compute(step)
            self._update(step)
        weights = hashlib.sha256()
        vectors: list[Any] = [
            np.frombuffer(self._file.text, np.uint8),
            *(self._parameters, self._running, self._average),
        ]
        for source, start, size in self._file.pieces:
            weights.update(vectors[source][start : start + size].tobytes())
        return {"weights": weights.hexdigest(), "losses": self._losses.hexdigest()}

    def _compute(self, step: np.void) -> None:
        samples = int(step["samples"])
        arrays = {
            "parameters": self._parameters,
            "running": self._running,
            "starts": np.array(step["starts"]),
            "merges": np.array(self._file.merges),
            "keys": np.array(step["keys"]),
            "bytes": np.array(self._file.data),
            "indices": np.array(step["indices"]),
            "labels": np.array(self._file.targets[step["indices"][:samples]]),
            "losses": np.zeros(CAPACITY, np.float32),
            "metrics": np.zeros(CAPACITY, np.float32),
            "loss_sums": np.zeros(M),
            "metric_sums": np.zeros(M),
            "buffers": np.array([b.ctypes.data for b in self._buffers]),
            "slots": np.array([self._slot.ctypes.data]),
        }
        call = Call(
            **{name: array.ctypes.data for name, array in arrays.items()},
            capacity=CAPACITY,
            micro_batches=M,
            slots_size=1,
            weight=float(step["weight"]),
            tail=self._file.tail,
        )
        ops = np.array(self._file.ops)
        assert self._kernels.run(ops.ctypes.data, len(ops), ctypes.addressof(call)) == 0
        self._losses.update(arrays["losses"][:samples].tobytes())
        self._losses.update(arrays["loss_sums"].tobytes())

    def _update(self, step: np.void) -> None:
        size = len(self._parameters)
        gradient = self._slot[:size]
        blocks = -(-size // 1024)
        padded = np.zeros(1024 * blocks, np.float32)
        padded[:size] = gradient
        squares = np.zeros(blocks)
        self._kernels.squared_norms(padded.ctypes.data, squares.ctypes.data, blocks)
        norm = math.sqrt(math.fsum(squares))
        if norm > step["max_norm"]:
            factor = float(step["max_norm"]) / norm
            self._kernels.scale(gradient.ctypes.data, factor, size)
        for (start, count), how in zip(
            self._file.groups, step["optimizers"], strict=True
        ):
            self._update_group(slice(start, start + count), Optimizer(*how.item()))
        self._running[:] = self._slot[self._file.tail :] / np.float32(M)
        if step["average"] == Averaging.BEGINS:
            self._average[:] = self._parameters
        else:
            vectors = self._average.ctypes.data, self._parameters.ctypes.data
            self._kernels.average(*vectors, float(step["average_weight"]), size)

    def _update_group(self, where: slice, how: Optimizer) -> None:
        vectors = [self._parameters[where], *(s[where] for s in self._states)]
        leaves = np.array([self._slot[where].ctypes.data])
        order = np.zeros(1, np.int32)
        self._kernels.update(
            ctypes.addressof(how),
            *(leaves.ctypes.data, order.ctypes.data, 1),
            *(vector.ctypes.data for vector in vectors),
            *(where.start, len(vectors[0]), None),
        )


def _room(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a copy that may be written to."""
    return np.array(values, np.float32)
