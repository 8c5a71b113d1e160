"""Attention beside a plain C reference, bit for bit, and beside torch."""

import ctypes
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import (
    Made,
    Sample,
    check_bits,
    compile_reference,
    operation,
    run_with,
)
from torch import Tensor
from torch.nn import functional

from samestep.kernels.interface import OpFlag, OpKind
from samestep.kernels.library import load_kernels


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    directory = tmp_path_factory.mktemp("reference")
    return compile_reference(directory, "reference_attention.c")


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
    room = sample.workspace(workspace(sizes))
    i += [y, kept, *(8 * [0]), room, *sizes]
    op = operation(OpKind.ATTENTION, i, [width**-0.5], OpFlag.CAUSAL * causal)
    features = {parts: rows, alone: heads * keys * width}
    features |= {y: queries * heads * width, kept: 2 * heads * queries}
    return sample, op, features


def workspace(sizes: Sizes) -> int:
    """Return how many floats an attention's workspace has."""
    _, _, keys, width = sizes
    return 16 * (6 * keys * width + 16 * (4 * width + 3 + 2 * keys))


@dataclass(frozen=True)
class Mask:
    """What is added to the scores: of every sample, or the same for all of them."""

    is_shared: bool
    dims: tuple[bool, bool, bool]
    """Whether heads, queries and keys have one of their own each."""
    hidden: float
    """The share of keys that are hidden."""


def with_mask(made: Made, mask: Mask | None) -> Made:
    """Return an attention with a mask."""
    sample, op, features = made
    if mask is None:
        return made
    sizes = [n if d else 1 for n, d in zip(op.i[26:29], mask.dims, strict=True)]
    rows, first = math.prod(sizes) + 3, 3
    steps = (sizes[1] * sizes[2], sizes[2], 1)
    strides = [n * d for n, d in zip(steps, mask.dims, strict=True)]
    if mask.is_shared:
        values = sample.floats("parameters", rows)
        op.i[30:36] = [-1, 0, first, *strides]
    else:
        buffer = sample.by_feature(rows)
        values, features[buffer] = sample.buffers[buffer], rows
        op.i[30:36] = [buffer, rows, first, *strides]
    is_hidden = torch.rand(values.shape, generator=sample.draw) < mask.hidden
    values[is_hidden] = -math.inf
    op.flags |= OpFlag.MASKED
    return made


MASKS = st.none() | st.builds(
    Mask,
    st.booleans(),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)


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
    i = [*forward.i[:17], *view, parts, parts, alone, *forward.i[25:36]]
    return (
        sample,
        operation(OpKind.ATTENTION_GRAD, i, [forward.f[0]], forward.flags),
        features,
    )


@settings(max_examples=60)
@given(
    sizes=st.tuples(
        st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)
    ),
    samples=st.integers(1, 35),
    is_causal=st.booleans(),
    mask=MASKS,
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
    mask: Mask | None,
    is_back: bool,
    scale: float,
    specials: float,
    misalignment: int,
    seed: int,
) -> None:
    def made() -> Made:
        sample = Sample([samples], 0, 0, seed, misalignment, specials)
        forward = with_mask(make_attention(sample, sizes, is_causal, scale), mask)
        return with_gradient(forward, scale) if is_back else forward

    check_bits(reference.reference_run, made)


@pytest.mark.parametrize("sizes", [(1, 300, 300, 3), (1, 20, 530, 5), (1, 5, 6, 260)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_back", [False, True])
def test_long_sums_of_attention_are_sums_of_blocks(
    reference: ctypes.CDLL, sizes: Sizes, is_causal: bool, is_back: bool
) -> None:
    def made() -> Made:
        forward = make_attention(Sample([5]), sizes, is_causal, 1.0)
        return with_gradient(forward, 1.0) if is_back else forward

    check_bits(reference.reference_run, made)


def heads_of(sample: Sample, view: list[int], sizes: Sizes) -> Tensor:
    """Return a view as [samples, heads, positions, width]."""
    buffer, rows, offset, head, position = view
    x = sample.buffers[buffer].view(-1, rows, 32).permute(0, 2, 1)
    x = x.reshape(-1, rows).contiguous()[: sample.samples]
    shape = (len(x), *sizes[:2], sizes[3])
    return x.as_strided(shape, (rows, head, position, 1), offset)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, Mask(False, (True, True, True), 0.5)])
def test_attention_is_that_of_torch_up_to_rounding(
    is_causal: bool, mask: Mask | None
) -> None:
    """Outputs and gradients, compared with float64."""
    sizes = (2, 21, 21, 8)
    made = with_mask(make_attention(Sample([40]), sizes, is_causal, 1.0), mask)
    sample, op, _ = with_gradient(made, 1.0)
    run_with(load_kernels())(op, sample.call())
    views = [list(op.i[k : k + 5]) for k in (0, 5, 10)]
    parts = [heads_of(sample, v, sizes).double().requires_grad_() for v in views]
    q, k, v = parts
    biases = torch.zeros(40, *sizes[:3])
    if mask is not None:
        biases = heads_of(sample, list(op.i[30:35]), (*sizes[:2], 1, 21))
    if is_causal:
        biases = biases.masked_fill(torch.ones(21, 21).triu(1).bool(), -math.inf)
    y = functional.scaled_dot_product_attention(q, k, v, attn_mask=biases.double())
    out = heads_of(sample, [op.i[15], 336, 0, 8, 16], sizes)
    assert torch.allclose(out.double(), y, atol=1e-6)
    dy = heads_of(sample, list(op.i[17:22]), sizes)
    expected = torch.autograd.grad(y, parts, dy.double())
    for view, buffer, gradient in zip(views, op.i[22:25], expected, strict=True):
        found = heads_of(sample, [buffer, *view[1:]], sizes)
        assert torch.allclose(found.double(), gradient, atol=3e-6)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_query_that_sees_no_key_gives_zeros(is_shared: bool) -> None:
    sizes = (2, 5, 7, 4)
    mask = Mask(is_shared, (False, True, False), 1.0)
    made = with_mask(make_attention(Sample([9]), sizes, False, 1.0), mask)
    sample, op, _ = with_gradient(made, 1.0)
    run_with(load_kernels())(op, sample.call())
    results = [(15, [0, 40, 0, 4, 8], 5)]
    results += [(22 + n, list(op.i[5 * n : 5 * n + 5]), (5, 7, 7)[n]) for n in range(3)]
    for number, view, positions in results:
        found = heads_of(sample, [op.i[number], *view[1:]], (2, positions, 0, 4))
        assert not found.any()
