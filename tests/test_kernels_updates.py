"""Updates that compute the gradients of matrices themselves, for rows of a worker."""

import ctypes

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_optimizer import NUMBERS
from test_kernels_products import (
    PANEL,
    Example,
    Floats,
    alone,
    by_panels,
    each_isa,
    equal,
    numbers,
    pieces,
    run,
    unaligned,
)

from samestep.core.ownership import shares
from samestep.core.tree import num_merges
from samestep.kernels.interface import (
    Call,
    Hashes,
    Kernels,
    Op,
    OpKind,
    Optimizer,
    OptimizerKind,
    Update,
)
from samestep.kernels.library import load_kernels
from samestep.state.hashing import KEYS, hash_of


BIASES = 7
"""Elements behind the matrix that are updated by a sum of leaves."""


def optimizer(kind: OptimizerKind, decay: float) -> Optimizer:
    return Optimizer(kind=kind, weight_decay=decay, **NUMBERS)


class Vectors:
    """Parameters and states of a matrix and BIASES more elements."""

    def __init__(self, size: int, seed: int) -> None:
        draws = np.random.default_rng(seed)
        drawn = draws.standard_normal((3, size)).astype(np.float32)
        drawn[2] = np.abs(drawn[2])
        self.all = [unaligned(vector) for vector in drawn]

    def addresses(self, start: int = 0) -> list[int]:
        """Return where each begins, from an element on."""
        return [vector[start:].ctypes.data for vector in self.all]


def update_after(
    kernels: Kernels,
    example: Example,
    leaves: list[Floats],
    how: list[Optimizer],
    vectors: Vectors,
    hashes: Hashes,
) -> None:
    """Update with gradients that are written first."""
    size = example.inputs * example.outputs
    slot = np.zeros(size, np.float32)
    i = numbers(0, 1, example.inputs, example.outputs, 0, *alone(example.outputs, 1))
    buffers = [by_panels(example.dy.T), by_panels(example.x, example.capacity)]
    op = Op(kind=OpKind.LINEAR_GRAD_WEIGHT, i=i)
    run(kernels, op, example, buffers, example.bias, [slot])
    rest = (leaves[0] + leaves[1])[size:].copy()
    order = np.zeros(1, np.int32)
    for number, (start, gradient) in enumerate(((0, slot), (size, rest))):
        leaf = np.array([gradient.ctypes.data])
        kernels.update(
            ctypes.addressof(how[number]),
            *(leaf.ctypes.data, order.ctypes.data, 1),
            *vectors.addresses(start),
            *(start, len(gradient), ctypes.addressof(hashes)),
        )


class Machine:
    """Several workers' activations of one layer, in memory that all of them read."""

    def __init__(self, example: Example, workers: int) -> None:
        inputs, outputs, starts = example.inputs, example.outputs, example.starts
        merges = example.merges
        self.example, self.shares = example, shares(len(merges), workers)
        ranges = [(starts[a], starts[b]) for a, b in self.shares]
        largest = max(max(end - first for first, end in ranges), 1)
        self.capacity = int(-(-largest // PANEL) * PANEL)
        of_dy, of_x = outputs, -(-inputs // PANEL) * PANEL
        self.of_dy, self.width = of_dy * self.capacity, (of_dy + of_x) * self.capacity
        self.memory = np.zeros((workers, self.width), np.float32)
        self.table: list[list[int]] = []
        for worker, (share, (first, end)) in enumerate(
            zip(self.shares, ranges, strict=True)
        ):
            dy = by_panels(example.dy[first:end].T).ravel()
            x = by_panels(example.x[first:end], self.capacity).ravel()
            self.memory[worker, : len(dy)] = dy
            self.memory[worker, self.of_dy :][: len(x)] = x
            for m in range(*share):
                a, b = starts[m] - first, starts[m + 1] - first
                self.table.append([worker * self.width, a, b, merges[m]])

    def update(
        self,
        kernels: Kernels,
        leaves: list[Floats],
        how: list[Optimizer],
        vectors: Vectors,
        hashes: Hashes,
    ) -> None:
        """Update the rows of every worker, one after the other."""
        inputs, outputs = self.example.inputs, self.example.outputs
        i = numbers(0, 1, inputs, outputs, 0, *alone(outputs, 1))
        op, workers = Op(kind=OpKind.LINEAR_GRAD_WEIGHT, i=i), len(self.shares)
        both, order = (Optimizer * 2)(*how), np.array([0, 1, -1], np.int32)
        pointers = np.array([leaf.ctypes.data for leaf in leaves])
        rows, rest = shares(outputs, workers), shares(BIASES, workers)
        for worker, own in enumerate(self.memory):
            start, size = own.ctypes.data, inputs * outputs
            buffers = np.array([start, start + 4 * self.of_dy])
            call = Call(buffers=buffers.ctypes.data, capacity=self.capacity)
            table = np.array(self.table) - [worker * self.width, 0, 0, 0]
            elements = [size + cut for cut in rest[worker]]
            parts = np.array([[-1, *elements, 1], [0, *rows[worker], 0]])
            update = Update(
                ops=ctypes.addressof(op),
                call=ctypes.addressof(call),
                micro_batches=table.ctypes.data,
                num_micro_batches=len(table),
                parts=parts.ctypes.data,
                num_parts=2,
                optimizers=ctypes.addressof(both),
                leaves=pointers.ctypes.data,
                order=order.ctypes.data,
                order_size=3,
                hashes=ctypes.addressof(hashes),
            )
            update.parameters, update.state1, update.state2 = vectors.addresses()
            kernels.update_parts(ctypes.addressof(update))


@each_isa
@settings(max_examples=12)
@given(
    st.integers(1, 70) | st.sampled_from([511, 512, 600]),
    st.integers(1, 50) | st.just(130),
    pieces,
    st.integers(1, 4),
    st.sampled_from(OptimizerKind),
    st.integers(0),
)
def test_an_update_with_its_own_gradients_equals_one_with_written_gradients(
    isa: str,
    inputs: int,
    outputs: int,
    pieces: list[int],
    workers: int,
    kind: OptimizerKind,
    seed: int,
) -> None:
    example, count = Example(inputs, outputs, pieces, seed), len(pieces)
    merges = [num_merges(m, (0, count), count) for m in range(count)]
    example.merges = np.array(merges, np.int64)
    size, kernels = inputs * outputs + BIASES, load_kernels(isa)
    draws = np.random.default_rng(seed)
    leaves = [draws.standard_normal(size).astype(np.float32) for _ in range(2)]
    how = [optimizer(kind, 0.98), optimizer(kind, 0.0)]
    expected, found = Vectors(size, seed), Vectors(size, seed)
    sums = [Hashes(keys=KEYS.ctypes.data) for _ in range(2)]
    update_after(kernels, example, leaves, how, expected, sums[0])
    Machine(example, workers).update(kernels, leaves, how, found, sums[1])
    for a, b in zip(expected.all, found.all, strict=True):
        assert equal(a, b)
    assert sums[0].gradient == sums[1].gradient
    assert sums[0].parameters == sums[1].parameters == hash_of(found.all[0][:size])
