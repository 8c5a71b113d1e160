"""Means in a user's own loop, by workers that are threads."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samestep import OwnCodeError
from samestep.core.ownership import shares
from samestep.loop.metrics import Piece, Tally


class Crew:
    """An exchange of threads, which adds what all of them have."""

    def __init__(self, workers: int) -> None:
        self.workers, self._cells = workers, dict[int, Tensor]()
        self._barrier = threading.Barrier(workers, timeout=20)

    def merge(self, values: Tensor) -> Tensor:
        """Add up the cells of all threads."""
        self._cells[threading.get_ident()] = values.clone()
        self._barrier.wait()
        values.copy_(torch.stack(list(self._cells.values())).sum(dim=0))
        if self._barrier.wait() == 0:
            self._cells.clear()
        self._barrier.wait()
        return values

    def all(self, work: Callable[[int], Any]) -> list[Any]:
        """Return what each worker returns, by rank."""
        results: dict[int, Any] = {}
        threads = [
            threading.Thread(target=lambda r=rank: results.update({r: work(r)}))
            for rank in range(self.workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return [results[rank] for rank in range(self.workers)]


def totals(rows: list[int], workers: int, seed: int) -> dict[str, tuple[float, float]]:
    """Total values of each piece; some pieces add twice, some names are rare."""
    crew = Crew(workers)

    def work(rank: int) -> dict[str, tuple[float, float]]:
        tally = Tally()
        for pieces in rows:
            row = tally.begin_row(pieces)
            for number in range(*shares(pieces, workers)[rank]):
                generator = torch.Generator().manual_seed(seed + 97 * row + number)
                values = torch.randn(4, generator=generator).double().tolist()
                with tally.of(Piece(row, number, samples=number + 1)):
                    if values[2] > 1:
                        tally.add("rare", (values[3], 1))
                    tally.add("loss", values[0])
                    tally.add("loss", torch.tensor(values[1]))
        return tally.totals(crew, rank)

    first, *others = crew.all(work)
    for other in others:
        assert list(other.items()) == list(first.items())
    assert isinstance(first, dict)
    return first


@settings(max_examples=20)
@given(
    st.lists(st.integers(0, 9), max_size=6), st.integers(2, 4), st.integers(0, 2**30)
)
def test_means_have_the_same_bits_and_order_at_any_number_of_workers(
    rows: list[int], workers: int, seed: int
) -> None:
    alone = totals(rows, 1, seed)
    assert list(totals(rows, workers, seed).items()) == list(alone.items())
    assert ("loss" in alone) == (sum(rows) > 0)


def test_workers_that_have_not_begun_the_same_steps_get_an_error() -> None:
    crew = Crew(2)

    def work(rank: int) -> str:
        tally = Tally()
        for _ in range(2 + rank):
            tally.begin_row(4)
        with pytest.raises(OwnCodeError) as caught:
            tally.totals(crew, rank)
        return str(caught.value)

    for message in crew.all(work):
        assert "they have begun 2, 3 of them" in message
