"""Reads the global batches of a stream one after the other, epoch after epoch."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from samestep.core.progress import StreamPosition
from samestep.data.given import GivenData
from samestep.data.stream import (
    RawBatch,
    bookmark_of_json,
    json_of_bookmark,
    read,
    sketch,
)
from samestep.errors import OwnCodeError
from samestep.user_code import seeding
from samestep.user_code.references import blaming


KEPT = 3
"""How many global batches are kept: that of a step, and those that were asked about."""


class ReadBatch(NamedTuple):
    """The global batch of one step."""

    position: StreamPosition
    """Where to go on with it."""
    size: int
    samples: list[Any] | None
    """None in a worker whose helper has read them."""
    digest: str = ""
    """Of samples that are not here."""

    @property
    def sketch(self) -> str:
        """What must be equal in all workers."""
        return self.digest if self.samples is None else sketch(self.samples)


class StreamReader:
    """A stream, from the first step on, or from a position."""

    def __init__(
        self, given: GivenData, seed: int, most_steps: int | None = None
    ) -> None:
        """Read at most `most_steps` steps of each epoch."""
        self._given, self._seed, self._most_steps = given, seed, most_steps
        self._ahead: Callable[[int], ReadBatch | None] | None = None
        self._seconds = 0.0
        self.go_to(0, StreamPosition())

    def go_to(self, step: int, position: StreamPosition) -> None:
        """Go on with a step, at the position that another reader had there."""
        self._next, self._epoch = step, position.epoch
        self._first_step = position.first_step
        self._read: dict[int, ReadBatch] = {}
        self._reading: Iterator[RawBatch] | None = None
        self._bookmark = bookmark_of_json(position.bookmark)

    def catch_up(self, step: int, position: StreamPosition) -> None:
        """Read up to a step, which is at this position: from there if that is nearer.

        Raises OwnCodeError.
        """
        if position.bookmark or position.first_step != self._first_step:
            self.go_to(step, position)
        self.at(step)

    def follow(self, ahead: Callable[[int], ReadBatch | None]) -> None:
        """Get batches from now on from a helper that reads ahead.

        `ahead` returns that of a step; or none, and has called `take_over`.
        """
        self._ahead, self._reading = ahead, None

    def take_over(self) -> None:
        """Read here again, and also those batches that only the helper has read."""
        if self._ahead is None:
            return
        self._ahead, known = None, self._read
        told = (step for step, batch in known.items() if batch.samples is None)
        first = next(told, max(known))
        self.go_to(first, known[first].position)
        self._read = {step: batch for step, batch in known.items() if step < first}

    def take_seconds(self) -> float:
        """Return how long reading took here since the last call."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def at(self, step: int) -> ReadBatch:
        """Return the global batch of a step: not of those long before the last one.

        Raises OwnCodeError.
        """
        while self._next <= step:
            if self._ahead is None:
                self._advance()
            elif (batch := self._ahead(self._next)) is not None:
                self._keep(batch)
        return self._read[step]

    def _advance(self) -> None:
        """Read one more global batch, or begin another epoch."""
        number, began = self._next - self._first_step, time.perf_counter()
        with (
            seeding.kept(),  # the stream has generators of its own
            blaming(f"epoch {self._epoch} of the stream"),
        ):
            if self._reading is None:
                place = self._epoch, number, self._bookmark
                self._reading = read(self._given, self._seed, *place)
            batch = None if number == self._most_steps else next(self._reading, None)
        self._seconds += time.perf_counter() - began
        if batch is None:
            self._begin_epoch(number)
            return
        position = StreamPosition(
            epoch=self._epoch,
            first_step=self._first_step,
            bookmark=json_of_bookmark(batch.bookmark),
        )
        self._keep(ReadBatch(position, len(batch.samples), batch.samples))

    def _keep(self, batch: ReadBatch) -> None:
        self._read[self._next] = batch
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
