"""The products of a linear layer: bit for bit those of a plain C reference."""

import ctypes
import subprocess
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from samestep.kernels.compiling import machine_compiler
from samestep.kernels.interface import Call, Kernels, Op, OpFlag, OpKind
from samestep.kernels.library import load_kernels, supported_isas


Floats = NDArray[np.float32]
HERE = Path(__file__).parent
PANEL = 32
GUARD = 777.0
"""Stands around what a kernel may write, and must be there afterwards."""

sizes = st.integers(1, 70) | st.sampled_from([255, 256, 257, 300, 520])
pieces = st.lists(
    st.integers(0, 40) | st.sampled_from([256, 300]), min_size=1, max_size=7
)
each_isa = pytest.mark.parametrize("isa", supported_isas())


def compiled(name: str, directory: Path) -> ctypes.CDLL:
    """Compile a file of plain loops; skip the test where there is no compiler."""
    compiler = machine_compiler()
    if compiler is None:
        pytest.skip("the reference needs a C compiler")
    out = directory / "reference.so"
    flags = ["-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    source = HERE / "kernels" / name
    subprocess.run([*compiler, *flags, str(source), "-o", str(out), "-lm"], check=True)
    return ctypes.CDLL(str(out))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the plain loops."""
    return compiled("reference.c", tmp_path_factory.mktemp("reference"))


class Example:
    """A linear layer with `starts[-1]` samples: arrays as the reference has them."""

    def __init__(self, inputs: int, outputs: int, pieces: list[int], seed: int) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.starts = np.concatenate([[0], np.cumsum(pieces)]).astype(np.int64)
        self.samples = int(self.starts[-1])
        self.capacity = -(-max(self.samples, 1) // PANEL) * PANEL
        draws = np.random.default_rng(seed)
        self.x = self.draw(draws, self.samples, inputs)
        self.dy = self.draw(draws, self.samples, outputs)
        self.weight = self.draw(draws, outputs, inputs)
        self.bias = self.draw(draws, outputs)
        self.merges = merges_of(len(pieces), draws)
        self.keys = np.zeros(len(pieces), np.uint64)

    @staticmethod
    def draw(draws: np.random.Generator, *shape: int) -> Floats:
        """Return numbers of very different sizes, among them zeros and subnormals."""
        values = draws.standard_normal(shape) * 2.0 ** draws.integers(-12, 12, shape)
        tiny = draws.random(shape)
        values = np.where(tiny < 0.02, values * 2.0**-140, values)
        return np.where(tiny > 0.98, 0, values).astype(np.float32)


def merges_of(micro_batches: int, draws: np.random.Generator) -> NDArray[np.int64]:
    """Return for each micro-batch how many sums it completes: any legal number."""
    merges, depth = np.zeros(micro_batches, np.int64), 0
    for m in range(micro_batches):
        merges[m] = draws.integers(0, depth + 1)
        depth += 1 - int(merges[m])
    return merges


def by_panels(matrix: Floats, rows_allocated: int | None = None) -> Floats:
    """Return [rows, columns] as panels of 32 columns; the padding is 1, 2, 3, ..."""
    rows, columns = matrix.shape
    allocated = rows_allocated or rows
    panels = -(-columns // PANEL)
    padded = np.arange(allocated * panels * PANEL, dtype=np.float32)
    padded = padded.reshape(allocated, panels * PANEL)
    padded[:rows, :columns] = matrix
    return padded.reshape(allocated, panels, PANEL).swapaxes(0, 1).copy()


def from_panels(panels: Floats, columns: int) -> Floats:
    """Return [rows, columns] of panels [panels, rows, 32]."""
    return panels.swapaxes(0, 1).reshape(panels.shape[1], -1)[:, :columns].copy()


def run(
    kernels: Kernels,
    op: Op,
    example: Example,
    buffers: list[Floats],
    parameters: Floats,
    slots: list[Floats] | None = None,
) -> None:
    """Run one operation on an example."""
    pointers = np.array([b.ctypes.data for b in buffers], np.int64)
    slot_pointers = np.array([s.ctypes.data for s in slots or []] or [0], np.int64)
    call = Call(
        buffers=pointers.ctypes.data,
        parameters=parameters.ctypes.data,
        capacity=example.capacity,
        micro_batches=len(example.starts) - 1,
        starts=example.starts.ctypes.data,
        merges=example.merges.ctypes.data,
        keys=example.keys.ctypes.data,
        slots_size=len(slots or []),
        slots=slot_pointers.ctypes.data,
    )
    assert kernels.run(ctypes.addressof(op), 1, ctypes.addressof(call)) == 0


def unaligned(array: Floats) -> Floats:
    """Return a copy that begins 4 bytes after a multiple of 64."""
    room = np.full(array.size + 32, GUARD, np.float32)
    start = (-room.ctypes.data // 4) % 16 + 1
    view = room[start : start + array.size].reshape(array.shape)
    view[...] = array
    return view


def equal(a: Floats, b: Floats) -> bool:
    """Return whether all bits are equal; any NaN equals any other."""
    same = a.view(np.int32) == b.view(np.int32)
    return bool(np.all(same | (np.isnan(a) & np.isnan(b))))


def address(array: Floats | None) -> c_void_p:
    """Return the pointer to an array for ctypes; None is NULL."""
    return c_void_p(None if array is None else array.ctypes.data)


def parameters_of(example: Example) -> Floats:
    """Return a vector of parameters: 3 others, the weight, the bias."""
    others = np.full(3, GUARD, np.float32)
    return np.concatenate([others, example.weight.ravel(), example.bias])


def alone(*rows: int) -> list[int]:
    """Return the numbers of one position in buffers of so many rows."""
    return [1, *(number for count in rows for number in (count, 0, 0))]


def numbers(*of_op: int) -> ctypes.Array[c_int64]:
    """Return the numbers of an operation."""
    i: ctypes.Array[c_int64] = Op().i
    i[: len(of_op)] = list(of_op)
    return i


@each_isa
@settings(max_examples=25)
@given(sizes, sizes, st.integers(1, 200), st.booleans(), st.booleans(), st.integers(0))
def test_a_linear_layer_equals_the_reference(
    reference: ctypes.CDLL,
    isa: str,
    inputs: int,
    outputs: int,
    samples: int,
    has_bias: bool,
    is_relu: bool,
    seed: int,
) -> None:
    example = Example(inputs, outputs, [samples], seed)
    x = unaligned(by_panels(example.x.T))
    y = unaligned(
        np.full((example.capacity // PANEL, outputs, PANEL), GUARD, np.float32)
    )
    offset = 3 + example.weight.size if has_bias else -1
    op = Op(
        kind=OpKind.LINEAR,
        flags=OpFlag.RELU if is_relu else 0,
        i=numbers(0, 1, inputs, outputs, 3, offset, 0, *alone(inputs, outputs)),
    )
    run(load_kernels(isa), op, example, [x, y], unaligned(parameters_of(example)))
    expected = np.empty((samples, outputs), np.float32)
    reference.linear(
        address(example.x),
        address(example.weight),
        address(example.bias if has_bias else None),
        address(expected),
        *(c_int64(n) for n in (samples, inputs, outputs)),
        is_relu,
    )
    assert equal(from_panels(y, samples).T.copy(), expected)


def mix(x: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the numbers that docs/arithmetic.md makes of counters."""
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x735A2D97)
    return x ^ x >> np.uint32(15)


def kept(example: Example, keys: NDArray[np.uint64], stream: int, p: float) -> Floats:
    """Return the factors [samples, outputs] of dropout: 0 or 1 / (1 - p)."""
    draws = []
    for samples, key in zip(micro_batches(example), keys, strict=True):
        size = (samples.stop - samples.start) * example.outputs
        counters = np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B9)
        high = np.uint32(((int(key) >> 32) + stream * 0x85EBCA6B) % 2**32)
        draws.append(mix(mix(counters + np.uint32(int(key) % 2**32)) ^ high))
    is_kept = np.concatenate(draws) >= round(p * 2**32)
    factors = np.where(is_kept, np.float32(1 / (1 - p)), np.float32(0))
    return factors.reshape(example.samples, example.outputs)


@each_isa
@settings(max_examples=15)
@given(st.integers(1, 40), pieces, st.sampled_from([0.0, 0.25, 0.75]), st.integers(0))
def test_dropout_draws_from_the_key_of_each_micro_batch(
    isa: str, outputs: int, pieces: list[int], p: float, seed: int
) -> None:
    example, stream = Example(5, outputs, pieces, seed), 2
    draws = np.random.default_rng(seed)
    example.keys = draws.integers(2**64, size=len(pieces), dtype=np.uint64)
    x, parameters = by_panels(example.x.T), parameters_of(example)
    y = np.zeros((2, example.capacity // PANEL, outputs, PANEL), np.float32)
    i = numbers(0, 1, 5, outputs, 3, -1, stream, *alone(5, outputs))
    flags, f = OpFlag.RELU, (c_float * 4)(p)
    plain = Op(kind=OpKind.LINEAR, flags=flags, i=i, f=f)
    dropped = Op(kind=OpKind.LINEAR, flags=flags | OpFlag.DROPOUT, i=i, f=f)
    for n, op in enumerate((plain, dropped)):
        run(load_kernels(isa), op, example, [x, y[n]], parameters)
    before, after = (from_panels(panels, example.samples).T for panels in y)
    factors = kept(example, example.keys, stream, p)
    assert equal(after.copy(), np.where(factors > 0, before * factors, np.float32(0)))


@each_isa
@settings(max_examples=25)
@given(sizes, sizes, st.integers(1, 200), st.booleans(), st.integers(0))
def test_the_gradient_of_the_inputs_equals_the_reference(
    reference: ctypes.CDLL,
    isa: str,
    inputs: int,
    outputs: int,
    samples: int,
    has_gate: bool,
    seed: int,
) -> None:
    example = Example(inputs, outputs, [samples], seed)
    dy = unaligned(by_panels(example.dy.T))
    dx = unaligned(
        np.full((example.capacity // PANEL, inputs, PANEL), GUARD, np.float32)
    )
    gate = unaligned(by_panels(example.x.T))
    op = Op(
        kind=OpKind.LINEAR_GRAD_INPUT,
        i=numbers(
            *(0, 1, inputs, outputs, 3, 2 if has_gate else -1), *alone(outputs, inputs)
        ),
        f=(c_float * 4)(1.25),
    )
    run(
        load_kernels(isa),
        op,
        example,
        [dy, dx, gate],
        unaligned(parameters_of(example)),
    )
    expected = np.empty((samples, inputs), np.float32)
    reference.grad_input(
        address(example.dy),
        address(example.weight),
        address(example.x if has_gate else None),
        c_float(1.25),
        address(expected),
        *(c_int64(n) for n in (samples, inputs, outputs)),
    )
    assert equal(from_panels(dx, samples).T.copy(), expected)


def summed(example: Example, leaves: list[Floats]) -> list[Floats]:
    """Return what is left of the micro-batches' gradients after their merges."""
    stack: list[Floats] = []
    for leaf, merges in zip(leaves, example.merges, strict=True):
        stack.append(leaf)
        for _ in range(merges):
            last = stack.pop()
            stack.append(stack.pop() + last)
    return stack


def micro_batches(example: Example) -> list[slice]:
    """Return the samples of each micro-batch."""
    ends = zip(example.starts[:-1], example.starts[1:], strict=True)
    return [slice(int(first), int(end)) for first, end in ends]


@each_isa
@settings(max_examples=25)
@given(sizes, st.integers(1, 50), pieces, st.integers(0))
def test_the_gradients_of_weight_and_bias_equal_the_reference(
    reference: ctypes.CDLL,
    isa: str,
    inputs: int,
    outputs: int,
    pieces: list[int],
    seed: int,
) -> None:
    example = Example(inputs, outputs, pieces, seed)
    weights, biases = [], []
    for samples in micro_batches(example):
        dy, x = example.dy[samples].copy(), example.x[samples].copy()
        dw, db = np.empty((outputs, inputs), np.float32), np.empty(outputs, np.float32)
        counts = [c_int64(n) for n in (len(x), inputs, outputs)]
        reference.grad_weight(address(dy), address(x), address(dw), *counts)
        reference.grad_bias(address(dy), address(db), counts[0], counts[2])
        weights.append(dw)
        biases.append(db)
    left = list(zip(summed(example, weights), summed(example, biases), strict=True))
    size = inputs * outputs
    slots = [unaligned(np.full(size + outputs + 4, GUARD, np.float32)) for _ in left]
    buffers = [by_panels(example.dy.T), by_panels(example.x, example.capacity)]
    of_weight = numbers(0, 1, inputs, outputs, 2, *alone(outputs, 1))
    of_bias = numbers(0, outputs, 2 + size, outputs, 0)
    kernels = load_kernels(isa)
    for kind, i in (
        (OpKind.LINEAR_GRAD_WEIGHT, of_weight),
        (OpKind.GRAD_BIAS, of_bias),
    ):
        run(kernels, Op(kind=kind, i=i), example, buffers, example.bias, slots)
    for slot, (dw, db) in zip(slots, left, strict=True):
        assert equal(slot[2 : 2 + size].reshape(dw.shape), dw)
        assert equal(slot[2 + size : -2], db)
        assert np.all(slot[[0, 1, -2, -1]] == GUARD)


@each_isa
@settings(max_examples=25)
@given(sizes, st.integers(1, 100), st.integers(0))
def test_a_transpose_moves_every_element(
    isa: str, features: int, samples: int, seed: int
) -> None:
    example = Example(features, 1, [samples], seed)
    x = unaligned(by_panels(example.x.T))
    panels = -(-features // PANEL)
    y = unaligned(np.full((panels, example.capacity, PANEL), GUARD, np.float32))
    op = Op(kind=OpKind.TRANSPOSE, i=numbers(0, 1, features, *alone(features)))
    run(load_kernels(isa), op, example, [x, y], example.bias)
    assert equal(from_panels(y, features)[:samples], example.x)


@each_isa
def test_products_treat_infinities_and_nan_as_ieee_754_does(isa: str) -> None:
    example = Example(3, 2, [2], 0)
    example.x = np.array([[np.inf, 1, 0], [1, 2, 3]], np.float32)
    example.weight = np.array([[1, 1, 1], [0, np.nan, 1]], np.float32)
    x = by_panels(example.x.T)
    y = np.zeros((1, 2, PANEL), np.float32)
    op = Op(
        kind=OpKind.LINEAR,
        flags=OpFlag.RELU,
        i=numbers(0, 1, 3, 2, 3, -1, 0, *alone(3, 2)),
    )
    run(load_kernels(isa), op, example, [x, y], parameters_of(example))
    expected = np.array([[np.inf, np.nan], [6, np.nan]], np.float32)
    assert equal(from_panels(y, 2).T.copy(), expected)


SPECIAL = [0x0, 0x1, 0x7FFFFF, 0x800000, 0x3F800000, 0x3F800001, 0x7F7FFFFF]
SPECIAL += [0x7F800000, 0x7FC00000, 0x33800000, 0x0C000000, 0x34000001]
patterns = st.sampled_from(SPECIAL) | st.integers(0, 2**31 - 1)


@each_isa
@settings(max_examples=200)
@given(st.lists(patterns, min_size=3, max_size=3), st.integers(0, 7), st.booleans())
def test_an_fma_rounds_once(
    reference: ctypes.CDLL, isa: str, bits: list[int], signs: int, near: bool
) -> None:
    """A product of two terms is `fma(a, b, fma(c, 1, 0))`, the software fma's too."""
    words = [b | (signs >> n & 1) << 31 for n, b in enumerate(bits)]
    a, b, c = (float(x) for x in np.array(words, np.uint32).view(np.float32))
    if near:
        with np.errstate(all="ignore"):
            c = float(np.nextafter(-np.float32(a * b), np.float32(1)))
    example = Example(2, 1, [1], 0)
    example.x[0], example.weight[0] = np.array([[1, b], [c, a]], np.float32)
    y = np.zeros((1, 1, PANEL), np.float32)
    op = Op(kind=OpKind.LINEAR, i=numbers(0, 1, 2, 1, 3, -1, 0, *alone(2, 1)))
    buffers = [by_panels(example.x.T), y]
    run(load_kernels(isa), op, example, buffers, parameters_of(example))
    expected = np.empty((1, 1), np.float32)
    arrays = map(address, (example.x, example.weight, None, expected))
    reference.linear(*arrays, *(c_int64(n) for n in (1, 2, 1)), 0)
    assert equal(y[0, 0, :1].copy(), expected.ravel())
