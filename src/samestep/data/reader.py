"""Reads the global batches of a stream one after the other, epoch after epoch."""

from collections.abc import Iterator
from typing import NamedTuple

from samestep.core.progress import StreamPosition
from samestep.data.given import GivenData
from samestep.data.stream import RawBatch, bookmark_of_json, json_of_bookmark, read
from samestep.errors import OwnCodeError
from samestep.user_code import seeding


KEPT = 3
"""How many global batches are kept: that of a step, and those that were asked about."""


class ReadBatch(NamedTuple):
    """The global batch of one step."""

    epoch: int
    first_step: int
    """The first step of the epoch."""
    batch: RawBatch


class StreamReader:
    """A stream, from the first step on, or from a position."""

    def __init__(
        self, given: GivenData, seed: int, most_steps: int | None = None
    ) -> None:
        """Read at most `most_steps` steps of each epoch."""
        self._given, self._seed, self._most_steps = given, seed, most_steps
        self.go_to(0, StreamPosition())

    def go_to(self, step: int, position: StreamPosition) -> None:
        """Go on with a step, at the position that another reader had there."""
        self._next, self._epoch = step, position.epoch
        self._first_step = position.first_step
        self._read: dict[int, ReadBatch] = {}
        self._reading: Iterator[RawBatch] | None = None
        mark = position.bookmark
        self._bookmark = bookmark_of_json(mark) if mark is not None else None

    def at(self, step: int) -> ReadBatch:
        """Return the global batch of a step: not of those long before the last one.

        Raises OwnCodeError.
        """
        while self._next <= step:
            self._advance()
        return self._read[step]

    def position(self, step: int) -> StreamPosition:
        """Return where to go on with a step."""
        epoch, first_step, batch = self.at(step)
        mark = json_of_bookmark(batch.bookmark) if batch.bookmark else None
        return StreamPosition(epoch=epoch, first_step=first_step, bookmark=mark)

    def _advance(self) -> None:
        """Read one more global batch, or begin another epoch."""
        number = self._next - self._first_step
        with seeding.kept():  # the stream has generators of its own
            if self._reading is None:
                place = self._epoch, number, self._bookmark
                self._reading = read(self._given, self._seed, *place)
            batch = None if number == self._most_steps else next(self._reading, None)
        if batch is None:
            self._begin_epoch(number)
            return
        self._read[self._next] = ReadBatch(self._epoch, self._first_step, batch)
        self._read.pop(self._next - KEPT, None)
        self._next += 1

    def _begin_epoch(self, steps: int) -> None:
        if steps == 0:
            raise OwnCodeError(
                f"An epoch has samples; epoch {self._epoch} of the stream had none. It "
                "must begin anew whenever it is iterated over."
            )
        self._epoch, self._first_step = self._epoch + 1, self._next
        self._reading = self._bookmark = None
