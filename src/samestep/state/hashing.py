"""Hashes of vectors: sums over their words, so each worker adds what it has.

    sum over words w of  w * KEYS[place % BLOCK] * factor(place // BLOCK)  modulo 2**64

A word is the 32 bits of a float32, or one of the two halves of a float64; `place`
counts words of the whole vector. However a vector is cut, its pieces add up to one
hash. This is multilinear hashing (Carter and Wegman 1979, "Universal classes of hash
functions") with 32-bit keys and 64-bit sums (Halevi and Krawczyk 1997, MMH) inside a
block, and with odd 64-bit factors over the blocks. Two vectors that differ in one word
never collide: a key is odd, a word and a key have 32 bits, and an odd factor is
invertible. With keys drawn at random, two that differ inside one block collide with a
probability of at most 2**-31, and any two with one of at most 2**-25. The keys are
fixed and public, so this finds errors; it does not replace a cryptographic hash. Needs
no torch.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from samestep.core import splitmix
from samestep.errors import KernelError
from samestep.kernels.interface import Kernels
from samestep.kernels.library import load_kernels
from samestep.state.layout import Floats


BLOCK = 1024
"""Words of a block, `HASH_BLOCK` in the kernels."""
MASK = (1 << 64) - 1
SEED = 0x5341_4D45_5354_4550
PADDING = 16
"""Keys behind the block that vectors of the kernels may read."""
TOGETHER = 64 * BLOCK
"""Words that numpy takes at a time, which bounds the memory."""
CACHE_LINE = 64
"""Bytes."""


def _keys() -> NDArray[np.uint32]:
    """Return the keys, uint32 [BLOCK + PADDING], odd, from a cache line's begin on.

    Loads across two lines would make hashes a fifth slower.
    """
    numbers = splitmix.numbers(SEED, BLOCK + PADDING) >> np.uint64(32)
    room = np.empty(len(numbers) + CACHE_LINE // 4, np.uint32)
    first = -room.ctypes.data % CACHE_LINE // 4
    keys = room[first : first + len(numbers)]
    keys[:] = numbers | np.uint64(1)
    return keys


KEYS = _keys()


class StepHashes(NamedTuple):
    """Hashes of an optimizer step, or the part of them that a worker adds."""

    gradient: int
    """The hash of the gradient that the optimizer was given, its zeros as positive."""
    parameters: int
    """The hash of the parameters that it left."""

    def __str__(self) -> str:
        """Return both in 32 hexadecimal digits."""
        return f"{self.gradient:016x}{self.parameters:016x}"

    @classmethod
    def parse(cls, digits: str) -> list["StepHashes"]:
        """Return the steps whose digits stand one after the other."""
        return [cls(*row) for row in parse(digits).reshape(-1, 2).tolist()]


NO_HASHES = StepHashes(0, 0)
"""What a worker adds whose slice another worker adds."""


def parse(digits: str) -> NDArray[np.uint64]:
    """Return numbers [n] of 16 hexadecimal digits each."""
    return np.frombuffer(bytes.fromhex(digits), ">u8").astype(np.uint64)


def hash_of(vector: Floats, first: int = 0) -> int:
    """Return the hash of a piece [n] of a vector, contiguous; `first` is its place."""
    words, kernels = vector.view(np.uint32), _kernels()
    first *= vector.itemsize // 4
    if kernels is None:
        return by_numpy(words, first)
    place = words.ctypes.data
    value: int = kernels.hash(KEYS.ctypes.data, place, first, len(words))
    return value


def by_numpy(words: NDArray[np.uint32], first: int) -> int:
    """Return the hash of words [n]; `first` is the place of the first of them."""
    total = 0
    for start in range(0, len(words), TOGETHER):
        some = words[start : start + TOGETHER]
        places = np.arange(first + start, first + start + len(some), dtype=np.uint64)
        blocks, keys = np.divmod(places, np.uint64(BLOCK))
        factors = splitmix.mix((blocks + np.uint64(1)) * splitmix.GOLDEN) | np.uint64(1)
        terms = some.astype(np.uint64) * KEYS[keys] * factors
        total += int(terms.sum(dtype=np.uint64))
    return total & MASK


@cache
def _kernels() -> Kernels | None:
    """Return the kernels, None where there are none: numpy gives the same bits."""
    try:
        return load_kernels()
    except KernelError:
        return None
