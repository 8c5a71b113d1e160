"""Seeds the random generators that user code may draw from.

Results stay reproducible as long as every draw follows a seed that depends on the
recipe alone: one for loading data, for building the model, for each micro-batch and for
each batch of an evaluation.
"""

import contextlib
import ctypes
import random
from collections.abc import Iterator

import numpy as np
import torch
from numpy.random import mtrand

from samestep.system.json_values import JsonObject


MT19937_BYTES = 625 * 4
"""The state of the Mersenne Twister: 624 words, then how many of them were taken."""


def seed(number: int) -> None:
    """Seed torch's, Python's and numpy's default generators.

    Takes about 10 us, so it is left out where only built-in code runs, which draws from
    torch's alone.
    """
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


def other_states() -> JsonObject:
    """Return the states of Python's and numpy's generators as JSON values."""
    version, internal, gauss = random.getstate()
    numbers = np.random.get_state(legacy=False)
    key = numbers["state"]["key"].tolist()
    return {
        "python": [version, list(internal), gauss],
        "numpy": numbers | {"state": numbers["state"] | {"key": key}},
    }


def set_other_states(states: JsonObject) -> None:
    """Set Python's and numpy's generators to what `other_states` has returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(states["numpy"])


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore the states of the generators when the context ends."""
    # As they are: the lists of `other_states` take 0.1 ms.
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class Generators:
    """Keeps the generators of a process around the steps of a loop.

    Reading and setting numpy's takes 60 us, or 0.15 ms where the caches are full of
    other numbers. So its place is taken by another while a step lasts. That is exact
    unless it holds the second of two normal numbers drawn at once, which is in no
    generator: so its state is read whenever its memory has changed.
    """

    def __init__(self) -> None:
        self._spare = np.random.MT19937(0)
        self._memory = b""
        """That of numpy's generator, when it was last read and held no such number."""

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Do as the function `kept`."""
        generator = mtrand.get_bit_generator()
        if not self._can_be_replaced(generator):
            with kept():
                yield
            return
        states = torch.get_rng_state(), random.getstate()
        mtrand.set_bit_generator(self._spare)
        try:
            yield
        finally:
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            mtrand.set_bit_generator(generator)

    def _can_be_replaced(self, generator: object) -> bool:
        if not isinstance(generator, np.random.MT19937) or generator is self._spare:
            return False
        memory = ctypes.string_at(generator.ctypes.state_address, MT19937_BYTES)
        if memory != self._memory:
            holds_another = np.random.get_state(legacy=False)["has_gauss"]
            self._memory = b"" if holds_another else memory
        return memory == self._memory
