"""Gradients of weights of linear layers at positions: more rows, columns and terms
than are packed at a time."""

import ctypes
from ctypes import c_int64

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_products import (
    Example,
    Floats,
    address,
    by_panels,
    each_isa,
    equal,
    micro_batches,
    numbers,
    reference,
    run,
    summed,
    unaligned,
)

from samestep.kernels.interface import Op, OpKind
from samestep.kernels.library import load_kernels


__all__ = ["reference"]


@each_isa
@settings(max_examples=12)
@given(
    st.sampled_from([5, 97, 230]),
    st.sampled_from([3, 40, 600]),
    st.sampled_from([1, 3, 50]),
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(0),
)
def test_a_gradient_over_many_positions_equals_the_reference(
    reference: ctypes.CDLL,
    isa: str,
    outputs: int,
    inputs: int,
    positions: int,
    pieces: list[int],
    seed: int,
) -> None:
    example, draws = Example(inputs, outputs, pieces, seed), np.random.default_rng(seed)
    dy = Example.draw(draws, positions, example.samples, outputs)
    x = Example.draw(draws, positions, example.samples, inputs)
    leaves = [
        _gradient(reference, dy[:, part], x[:, part]) for part in micro_batches(example)
    ]
    left = summed(example, leaves)
    slots = [unaligned(np.zeros((outputs, inputs), np.float32)) for _ in left]
    rows = dy.transpose(0, 2, 1).reshape(positions * outputs, example.samples)
    panels = [by_panels(part, example.capacity) for part in x]
    i = [0, 1, inputs, outputs, 0, positions]
    i += [positions * outputs, 0, outputs, positions, 0, 1]
    op = Op(kind=OpKind.LINEAR_GRAD_WEIGHT, i=numbers(*i))
    buffers = [by_panels(rows), np.stack(panels, 1).copy()]
    run(load_kernels(isa), op, example, buffers, example.bias, slots)
    for slot, expected in zip(slots, left, strict=True):
        assert equal(slot, expected)


def _gradient(reference: ctypes.CDLL, dy: Floats, x: Floats) -> Floats:
    """Return [outputs, inputs] of a micro-batch [positions, samples, features]."""
    outputs, inputs = dy.shape[-1], x.shape[-1]
    dy, x = dy.reshape(-1, outputs).copy(), x.reshape(-1, inputs).copy()
    sums = np.empty((outputs, inputs), np.float32)
    counts = [c_int64(n) for n in (len(x), inputs, outputs)]
    reference.grad_weight(address(dy), address(x), address(sums), *counts)
    return sums
