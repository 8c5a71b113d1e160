"""Means over samples in a loop of one's own, the same at any number of workers."""

import operator
from typing import NamedTuple

from torch import Tensor

from samestep.core import tree
from samestep.errors import OwnCodeError
from samestep.loop.process_group import Group


Value = Tensor | float


class Piece(NamedTuple):
    """A piece of samples: one of the `pieces` of a row, such as a step."""

    row: int
    pieces: int
    number: int
    samples: int


class Note(NamedTuple):
    """What was measured on one piece."""

    piece: Piece
    name: str
    total: float
    divisor: float


class Tally:
    """Sums and counts of this worker's pieces, until all workers compare them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._rows = 0
        self._notes: list[Note] = []
        self.piece: Piece | None = None
        """Of the piece at hand."""

    def begin_row(self) -> int:
        """All workers: the number of the next row."""
        self._rows += 1
        return self._rows - 1

    def add(self, name: str, value: Value | tuple[Value, Value]) -> None:
        """Of the piece at hand: a sum over its samples, or a sum and a count.

        Raises OwnCodeError if there is none.
        """
        if self.piece is None:
            raise OwnCodeError(
                "`add` notes sums over the samples of one batch: call it in the loop "
                "over the batches of `steps` or `share`."
            )
        counted = value if isinstance(value, tuple) else (value, self.piece.samples)
        total, count = map(_number, counted)
        self._notes.append(Note(self.piece, name, total, count))

    def means(self) -> dict[str, float]:
        """All workers: what was added since the last call, by samples or counts.

        Summed in float64 in the order of the canonical tree over the pieces of a row,
        then row by row. NaN where a count is zero.
        """
        gathered = self._group.gather(self._notes)
        self._notes = []
        notes = [Note(Piece(*at), *rest) for each in gathered for at, *rest in each]
        notes.sort(key=lambda note: (note.piece.row, note.piece.number))
        by_name: dict[str, list[Note]] = {}
        for note in notes:
            by_name.setdefault(note.name, []).append(note)
        return {name: _mean(found) for name, found in by_name.items()}


def _mean(notes: list[Note]) -> float:
    """Of notes in the order of their rows."""
    rows: dict[int, list[Note]] = {}
    for note in notes:
        rows.setdefault(note.piece.row, []).append(note)
    total = count = 0.0
    for row in rows.values():
        total += _row_sum(row, [note.total for note in row])
        count += _row_sum(row, [note.divisor for note in row])
    return total / count if count else float("nan")


def _row_sum(row: list[Note], values: list[float]) -> float:
    pieces = row[0].piece.pieces
    leaves = {(m, m + 1): 0.0 for m in range(pieces)}
    for note, value in zip(row, values, strict=True):
        leaves[note.piece.number, note.piece.number + 1] += value
    return tree.reduce(pieces, leaves, operator.add)


def _number(value: Value) -> float:
    return float(value.detach().sum()) if isinstance(value, Tensor) else float(value)
