"""Means over samples in a user's own loop, the same at any number of workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from samestep.core.tree import tree_sum
from samestep.errors import OwnCodeError
from samestep.exchange import Merger
from samestep.loop.process_group import gather


Value = Tensor | float


class Piece(NamedTuple):
    """A piece of samples: one of those of a row, such as a step."""

    row: int
    number: int
    samples: int


class Tally:
    """Sums and counts of this worker's pieces, until all workers add them up."""

    def __init__(self) -> None:
        self._pieces: list[int] = []
        """How many pieces each row has."""
        self._cells: dict[str, dict[tuple[int, int], list[float]]] = {}
        """For each name, sum and count of each (row, number) of a piece."""
        self._piece: Piece | None = None
        """The current piece."""
        self._carried: dict[str, list[float]] = {}
        """Sums and counts of earlier rows, the same on all workers."""

    @contextmanager
    def of(self, piece: Piece) -> Iterator[None]:
        """Take what is added inside for sums over this piece."""
        self._piece = piece
        try:
            yield
        finally:
            self._piece = None

    @property
    def samples(self) -> int:
        """How many samples the current piece has; 0 if there is none."""
        return self._piece.samples if self._piece else 0

    def begin_row(self, pieces: int = 0) -> int:
        """All workers: return the number of the next row."""
        self._pieces.append(pieces)
        return len(self._pieces) - 1

    def has_pieces(self, row: int, pieces: int) -> None:
        """All workers: set how many pieces a row has, as they are found."""
        self._pieces[row] = pieces

    def add(self, name: str, value: Value | tuple[Value, Value]) -> None:
        """Add, for the current piece, a sum over its samples, or a sum and a count.

        Raises OwnCodeError if there is none.
        """
        if self._piece is None:
            raise OwnCodeError(
                "`add` notes sums over the samples of one batch: call it in the loop "
                "over the batches of `steps` or `share`."
            )
        row, number, samples = self._piece
        total, count = value if isinstance(value, tuple) else (value, samples)
        cells = self._cells.setdefault(name, {}).setdefault((row, number), [0.0, 0.0])
        cells[0] += _number(total)
        cells[1] += _number(count)

    def totals(self, exchange: Merger, rank: int) -> dict[str, tuple[float, float]]:
        """All workers: return sums and counts of what was added since the last call.

        Summed in float64 in the order of the canonical tree over the pieces of a row,
        then row by row.
        """
        totals = self.carry(exchange, rank)
        self._carried = {}
        return {name: (total, count) for name, (total, count) in totals.items()}

    def carry(self, exchange: Merger, rank: int) -> dict[str, list[float]]:
        """All workers: do as `totals`, but go on adding to what is returned."""
        first_row, names = self._agree(exchange, rank)
        if not names:
            return self._carried
        starts = [0, *accumulate(self._pieces[first_row:])]
        cells = exchange.merge(self._own_cells(names, first_row, starts))
        before = [self._carried.get(name, [0.0, 0.0]) for name in names]
        totals = torch.tensor(before, dtype=torch.float64)
        for start, end in pairwise(starts):
            if end > start:  # not a share of no samples
                totals += tree_sum(cells[:, start:end].transpose(1, 2))
        self._cells = {}
        self._carried |= dict(zip(names, totals.tolist(), strict=True))
        return self._carried

    def carry_on(self, totals: dict[str, list[float]]) -> None:
        """All workers: begin with what another tally had carried."""
        self._carried = {name: list(cell) for name, cell in totals.items()}

    def _agree(self, exchange: Merger, rank: int) -> tuple[int, list[str]]:
        """All workers: return the first row that anything was added in, and all names.

        Names stand in the order in which one worker alone would have met them. Raises
        OwnCodeError.
        """
        mine = [(*min(cells), name) for name, cells in self._cells.items()]
        every = gather(exchange, rank, [len(self._pieces), mine])
        rows = [begun for begun, _ in every]
        if len(set(rows)) > 1:
            raise OwnCodeError(
                "All workers iterate over the same `steps` and `share`s before they "
                f"call `mean`; they have begun {', '.join(map(str, rows))} of them."
            )
        first_notes = sorted(
            (row, at, i, name)
            for _, of in every
            for i, (row, at, name) in enumerate(of)
        )
        names = list(dict.fromkeys(name for *_, name in first_notes))
        return first_notes[0][0] if first_notes else rows[0], names

    def _own_cells(self, names: list[str], first_row: int, starts: list[int]) -> Tensor:
        """Return sums and counts, [names, pieces of all rows, 2]; zero for others'."""
        values = [[0.0, 0.0] for _ in range(len(names) * starts[-1])]
        for index, name in enumerate(names):
            for (row, number), cell in self._cells.get(name, {}).items():
                at = starts[row - first_row] + number
                values[index * starts[-1] + at] = cell
        return torch.tensor(values, dtype=torch.float64).view(len(names), -1, 2)


def _number(value: Value) -> float:
    return float(value.detach().sum()) if isinstance(value, Tensor) else float(value)
