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

from samestep.system.json_values import JsonObject


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
    state, others = torch.get_rng_state(), other_states()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        set_other_states(others)
