"""Tokens and tables of their rows beside a plain C reference, bit for bit."""

import ctypes
from collections.abc import Callable

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
)

from samestep.kernels.interface import OpKind


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    directory = tmp_path_factory.mktemp("reference")
    return compile_reference(directory, "reference_attention.c")


def make_tokens(sample: Sample, positions: int, width: int, vocabulary: int) -> Made:
    """Numbers of 64 bits, some of which are no tokens."""
    size = (sample.samples, positions)
    tokens = torch.randint(-1, vocabulary + 1, size, generator=sample.draw)
    sample.integers("tokens", tokens * (1 + (tokens < 0) * 2**40))
    to = sample.by_feature(positions)
    return sample, operation(OpKind.LOAD_TOKENS, [to, -1, positions]), {to: positions}


def make_constant_tokens(
    sample: Sample, positions: int, width: int, vocabulary: int
) -> Made:
    """The same tokens for every sample."""
    sample.floats("parameters", 3 + positions)
    tokens = torch.randint(-1, 2**24, (positions,), generator=sample.draw)
    sample.memory["parameters"][3:] = tokens
    to = sample.by_feature(positions)
    return sample, operation(OpKind.LOAD_TOKENS, [to, 3, positions]), {to: positions}


def some_tokens(sample: Sample, positions: int, vocabulary: int) -> list[int]:
    """Add tokens, of which every second row counts; return what an operation needs."""
    panels, rows = sample.capacity // 32, 1 + 2 * positions
    shape = (panels, rows, 32)
    tokens = torch.randint(
        -1, vocabulary + 1, shape, generator=sample.draw, dtype=torch.int32
    )
    number = sample.buffer(tokens.view(torch.float32))
    return [number, rows, 1, 2, positions, vocabulary]


def make_embedding(sample: Sample, positions: int, width: int, vocabulary: int) -> Made:
    sample.floats("parameters", 3 + vocabulary * width)
    number, *tokens = some_tokens(sample, positions, vocabulary)
    y = sample.by_feature(positions * width)
    op = operation(OpKind.EMBEDDING, [number, y, width, 3, *tokens])
    return sample, op, {y: positions * width}


def make_gradient(sample: Sample, positions: int, width: int, vocabulary: int) -> Made:
    for s in range(sample.num_slots):
        sample.floats(f"slot{s}", 3 + vocabulary * width)
    number, *tokens = some_tokens(sample, positions, vocabulary)
    shape = (-(-width // 32), positions * sample.capacity, 32)
    dy = sample.buffer(torch.randn(shape, generator=sample.draw))
    ends = sample.workspace(vocabulary + 1)
    order = sample.workspace(sample.capacity * positions)
    i = [dy, number, width, 3, *tokens, ends, order, vocabulary // 2 - 1]
    return sample, operation(OpKind.EMBEDDING_GRAD, i), {}


MAKERS = (make_tokens, make_constant_tokens, make_embedding, make_gradient)
Maker = Callable[[Sample, int, int, int], Made]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    ownership=st.tuples(st.integers(0, 5), st.integers(0, 16)),
    positions=st.integers(1, 9),
    width=st.integers(1, 70),
    vocabulary=st.integers(1, 12),
    misalignment=st.integers(0, 15),
    seed=st.integers(0, 2**32),
)
def test_an_operation_on_tokens_gives_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    make: Maker,
    sizes: list[int],
    ownership: tuple[int, int],
    positions: int,
    width: int,
    vocabulary: int,
    misalignment: int,
    seed: int,
) -> None:
    def made() -> Made:
        sample = Sample(sizes, *ownership, seed, misalignment)
        return make(sample, positions, width, vocabulary)

    check_bits(reference.reference_run, made)


@pytest.mark.parametrize("samples", [255, 256, 257, 512, 700])
def test_a_token_that_occurs_often_has_a_sum_of_blocks(
    reference: ctypes.CDLL, samples: int
) -> None:
    check_bits(
        reference.reference_run, lambda: make_gradient(Sample([samples, 40]), 2, 5, 1)
    )
