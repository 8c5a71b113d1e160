"""Hashes of vectors: one value however a vector is cut, with and without kernels."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samestep.kernels.library import load_kernels, supported_isas
from samestep.state import hashing
from samestep.state.hashing import BLOCK, KEYS, MASK, by_numpy, hash_of
from samestep.state.layout import Floats


def drawn(size: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def test_the_hash_is_that_of_its_definition() -> None:
    """In Python's integers, with the steps of SplitMix64 written out."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
        x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
        return x ^ x >> 31

    golden, words = 0x9E3779B97F4A7C15, drawn(2 * BLOCK + 5).view(np.uint32).tolist()
    keys = [
        mix(hashing.SEED + n * golden & MASK) >> 32 | 1 for n in range(1, BLOCK + 1)
    ]
    factors = [mix(n * golden & MASK) | 1 for n in range(1, 4)]
    terms = (w * keys[i % BLOCK] * factors[i // BLOCK] for i, w in enumerate(words))
    assert hash_of(drawn(2 * BLOCK + 5)) == sum(terms) & MASK


@given(
    st.integers(0, 3000),
    st.lists(st.integers(0, 3000), max_size=5),
    st.integers(0, 5000),
    st.integers(0),
)
def test_pieces_of_a_vector_add_up_to_its_hash(
    size: int, cuts: list[int], first: int, seed: int
) -> None:
    vector = drawn(size, seed)
    whole = by_numpy(vector.view(np.uint32), first)
    ends = [0, *sorted(min(cut, size) for cut in cuts), size]
    for isa in supported_isas():
        kernels, total = load_kernels(isa), 0
        for a, b in pairwise(ends):
            words = vector[a:b].ctypes.data
            total += kernels.hash(KEYS.ctypes.data, words, first + a, b - a)
        assert total & MASK == whole, isa


def test_numpy_takes_long_vectors_in_parts() -> None:
    vector = drawn(hashing.TOGETHER + 77)
    assert by_numpy(vector.view(np.uint32), 3) == hash_of(vector, 3)


def test_without_kernels_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = drawn(3000)
    known = hash_of(vector, 5)
    monkeypatch.setattr(hashing, "_kernels", lambda: None)
    assert hash_of(vector, 5) == known


def test_every_flipped_bit_and_the_order_of_words_change_the_hash() -> None:
    vector = drawn(2 * BLOCK)
    words, known = vector.view(np.uint32), hash_of(vector)
    for place in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK - 1):
        for bit in range(32):
            words[place] ^= np.uint32(1 << bit)
            assert hash_of(vector) != known
            words[place] ^= np.uint32(1 << bit)
    assert hash_of(vector) == known
    assert hash_of(vector[::-1].copy()) != known
    assert hash_of(np.concatenate([vector[BLOCK:], vector[:BLOCK]])) != known


def test_elements_of_float64_have_two_words() -> None:
    vector = np.random.default_rng(0).standard_normal(BLOCK)
    pieces = hash_of(vector[:700]) + hash_of(vector[700:], 700)
    assert pieces & MASK == hash_of(vector)
    assert hash_of(vector) == by_numpy(vector.view(np.uint32), 0)
