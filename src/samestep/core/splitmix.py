"""Random numbers by counters: SplitMix64 (Steele, Lea and Flood 2014), in numpy.

Only integers are involved, so every processor draws the same numbers.
"""

import numpy as np
from numpy.typing import NDArray


Numbers = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(numbers: Numbers) -> Numbers:
    """Hash uint64 [n] by the last step of SplitMix64, modulo 2**64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def numbers(key: int, size: int) -> Numbers:
    """Draw uint64 [size]: the first outputs of the generator with the state `key`."""
    counters = np.arange(1, size + 1, dtype=np.uint64)
    return mix(np.uint64(key) + counters * GOLDEN)


def uniform(key: int, size: int) -> NDArray[np.float32]:
    """Draw float32 [size] in [0, 1), multiples of 2**-24."""
    return (numbers(key, size) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def permutation(key: int, size: int) -> NDArray[np.int64]:
    """Draw a permutation of 0 to `size` - 1, int64 [size].

    It sorts random numbers; the sort is stable, so that equal ones have one order.
    """
    return np.argsort(numbers(key, size), kind="stable")
