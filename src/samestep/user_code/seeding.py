"""Seeds the random generators that user code may draw from.

Results stay reproducible as long as every draw follows a seed that depends on the
recipe alone: one for loading data, for building the model, for each micro-batch and for
each batch of an evaluation.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed(number: int) -> None:
    """Seed torch's, Python's and numpy's default generators.

    Takes about 10 us, so it is left out where only built-in code runs, which draws from
    torch's alone.
    """
    torch.default_generator.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore the states of the generators when the context ends."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])
