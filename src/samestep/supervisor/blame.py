"""Which micro-batches of a wrong step are wrong, and who computed them."""

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class WrongMicroBatch(NamedTuple):
    """A micro-batch whose gradient has another hash when it is computed again."""

    number: int
    """Its place in the global batch, counted from 0."""
    worker: int
    """The rank of the worker that computed it."""


def wrong_micro_batches(
    claimed: NDArray[np.uint64], computed: Sequence[int]
) -> list[WrongMicroBatch]:
    """Return what differs between a record [2 * M] of their ledger and hashes [M]."""
    pairs = claimed.reshape(-1, 2).tolist()
    return [
        WrongMicroBatch(number, worker)
        for number, ((theirs, worker), ours) in enumerate(
            zip(pairs, computed, strict=True)
        )
        if theirs != ours
    ]


def in_words(wrong: Sequence[WrongMicroBatch], micro_batches: int) -> str:
    """Return which ones are wrong, as the end of a sentence."""
    if len(wrong) == 1:
        number, worker = wrong[0]
        return f"micro-batch {number} is wrong, which worker {worker} computed"
    some = [
        f"{_ranges([each.number for each in group])} of worker {worker}"
        for worker, group in groupby(wrong, attrgetter("worker"))
    ]
    how_many = f"{len(wrong)} of {micro_batches} micro-batches are wrong"
    return f"{how_many}: {'; '.join(some)}"


def _ranges(numbers: Sequence[int]) -> str:
    """Return increasing numbers as `0 to 3, 8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)
