"""Attention beside a plain C reference, bit for bit, and beside torch."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import Made, Sample, compile_reference, operation, outcome
from torch import Tensor
from torch.nn import functional

from samestep.kernels.interface import Call, Kernels, Op, OpFlag, OpKind
from samestep.kernels.library import load_kernels, supported_isas


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    directory = tmp_path_factory.mktemp("reference")
    library = compile_reference(directory, "reference_attention.c")
    if library is None:
        pytest.skip("there is no C compiler here")
    return library


def run_with(kernels: Kernels) -> Callable[[Op, Call], object]:
    """Return what runs one operation with an instruction set's kernels."""

    def run(op: Op, call: Call) -> None:
        assert kernels.run(ctypes.addressof(op), 1, ctypes.addressof(call)) == 0

    return run


Sizes = tuple[int, int, int, int]
"""Heads, queries, keys, width."""


def make_attention(sample: Sample, sizes: Sizes, causal: bool, scale: float) -> Made:
    """Queries, keys and values, each where a module may leave them."""
    heads, queries, keys, width = sizes
    size = 3 * heads * width
    rows = max(queries, keys) * size
    parts = sample.by_feature(rows, scale)
    strides = [width, size]
    alone = sample.by_feature(heads * keys * width, scale)
    i = [parts, rows, 0, *strides, parts, rows, heads * width, *strides]
    i += [alone, heads * keys * width, 0, keys * width, width]
    y = sample.by_feature(queries * heads * width)
    kept = sample.by_feature(2 * heads * queries)
    room = sample.buffer(torch.zeros(workspace(sizes)))
    i += [y, kept, *(8 * [0]), room, *sizes]
    op = operation(OpKind.ATTENTION, i, [width**-0.5], OpFlag.CAUSAL * causal)
    features = {parts: rows, alone: heads * keys * width}
    features |= {y: queries * heads * width, kept: 2 * heads * queries}
    return sample, op, features


def workspace(sizes: Sizes) -> int:
    """Return how many floats an attention's workspace has."""
    _, _, keys, width = sizes
    return 16 * (6 * keys * width + 16 * (4 * width + 3 + 2 * keys))


def with_gradient(made: Made, scale: float) -> Made:
    """Return the gradient's operation after that of the forward pass."""
    sample, forward, features = made
    heads, queries, _, width = forward.i[26:30]
    run_with(load_kernels())(forward, sample.call())
    rows = heads * queries * width
    dy = sample.by_feature(rows, scale)
    parts = sample.by_feature(forward.i[1])
    alone = sample.by_feature(forward.i[11])
    features |= {dy: rows, parts: forward.i[1], alone: forward.i[11]}
    view = [dy, rows, 0, width, heads * width]
    i = [*forward.i[:17], *view, parts, parts, alone, *forward.i[25:30]]
    return (
        sample,
        operation(OpKind.ATTENTION_GRAD, i, [forward.f[0]], forward.flags),
        features,
    )


def check_bits(reference: ctypes.CDLL, made: Callable[[], Made]) -> None:
    """Compare an operation of every instruction set with the reference."""

    def plain(op: Op, call: Call) -> None:
        reference.reference_run(ctypes.byref(op), ctypes.byref(call))

    def found(run: Callable[[Op, Call], object]) -> list[Tensor]:
        sample, op, features = made()
        results = outcome((sample, op, features), run)
        del results[len(sample.memory) + op.i[25]]  # the workspace
        return results

    expected = found(plain)
    for isa in supported_isas():
        for x, y in zip(found(run_with(load_kernels(isa))), expected, strict=True):
            assert torch.equal(x, y), isa


@settings(max_examples=40)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)
    ),
    samples=st.integers(1, 35),
    is_causal=st.booleans(),
    is_back=st.booleans(),
    scale=st.sampled_from([0.3, 1.0, 4.0]),
    specials=st.sampled_from([0.0, 0.0, 0.01]),
    misalignment=st.integers(0, 15),
    seed=st.integers(0, 2**32),
)
def test_attention_gives_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    sizes: Sizes,
    samples: int,
    is_causal: bool,
    is_back: bool,
    scale: float,
    specials: float,
    misalignment: int,
    seed: int,
) -> None:
    def made() -> Made:
        sample = Sample([samples], 0, 0, seed, misalignment, specials)
        forward = make_attention(sample, sizes, is_causal, scale)
        return with_gradient(forward, scale) if is_back else forward

    check_bits(reference, made)


@pytest.mark.parametrize("sizes", [(1, 300, 300, 3), (1, 20, 530, 5), (1, 5, 6, 260)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_back", [False, True])
def test_long_sums_of_attention_are_sums_of_blocks(
    reference: ctypes.CDLL, sizes: Sizes, is_causal: bool, is_back: bool
) -> None:
    def made() -> Made:
        forward = make_attention(Sample([5]), sizes, is_causal, 1.0)
        return with_gradient(forward, 1.0) if is_back else forward

    check_bits(reference, made)


def heads_of(sample: Sample, view: list[int], sizes: Sizes) -> Tensor:
    """Return a view as [samples, heads, positions, width]."""
    buffer, rows, offset, head, position = view
    x = sample.buffers[buffer].view(-1, rows, 32).permute(0, 2, 1)
    x = x.reshape(-1, rows)[: sample.samples]
    shape = (len(x), *sizes[:2], sizes[3])
    return x.as_strided(shape, (rows, head, position, 1), offset)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_is_that_of_torch_up_to_rounding(is_causal: bool) -> None:
    """Outputs and gradients, compared with float64."""
    sizes = (2, 21, 21, 8)
    made = make_attention(Sample([40]), sizes, is_causal, 1.0)
    sample, op, _ = with_gradient(made, 1.0)
    run_with(load_kernels())(op, sample.call())
    views = [list(op.i[k : k + 5]) for k in (0, 5, 10)]
    parts = [heads_of(sample, v, sizes).double().requires_grad_() for v in views]
    q, k, v = parts
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    out = heads_of(sample, [op.i[15], 336, 0, 8, 16], sizes)
    assert torch.allclose(out.double(), y, atol=1e-6)
    dy = heads_of(sample, list(op.i[17:22]), sizes)
    expected = torch.autograd.grad(y, parts, dy.double())
    for view, buffer, gradient in zip(views, op.i[22:25], expected, strict=True):
        found = heads_of(sample, [buffer, *view[1:]], sizes)
        assert torch.allclose(found.double(), gradient, atol=3e-6)
