"""A consistent copy of a training in memory, from which it goes on after a failure.

The memory belongs to the supervisor, so it survives the workers. Two slots alternate;
while one is written, the other is complete:

    slot  [ progress, JSON ][ marks, one per worker ][ parameters ][ states ][ tail ]
          <---- head, rounded up to whole pages ---->

Each worker clears its mark, copies its slice of the vectors, and then marks it with the
step and a checksum; a slot counts when all marks name the same step and all checksums
hold. So no order of writes between processes matters, and a worker may die anywhere.
The tail, of all buffers, and the progress are rank 0's to write.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samestep.files.untrusted import parse_json
from samestep.state.frozen import Arrays
from samestep.state.layout import Floats, Layout
from samestep.system import shared_memory
from samestep.system.json_values import JsonObject


PROGRESS_BYTES = 5 << 16
"""Most of it is for hashes of micro-batches: 32 digits for each of at most 128, of at
most 50 steps."""
NOTHING = 0
"""The mark of a slice that is not complete; fresh memory is zero."""


@dataclass
class State:
    """A training between two steps: nothing else decides how it goes on."""

    progress: JsonObject
    """Plain JSON values; `step` is the number of steps taken, over all epochs."""
    parameters: Floats
    states: Floats
    """[number of states, size]"""
    tail: Floats
    """[kept_tail]"""
    constants: Arrays = field(default_factory=dict)
    """Tensors that training does not change, to complete the files of weights."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.progress["step"])

    @property
    def epochs(self) -> int:
        """Complete epochs."""
        return int(self.progress["epochs"])


@dataclass
class _Slot:
    progress: NDArray[np.uint8]
    marks: NDArray[np.int64]
    """[workers, 2]: step + 1, checksum."""
    state: State


class Snapshots:
    """Both slots, for the workers of one generation."""

    def __init__(
        self,
        fd: int,
        layout: Layout,
        workers: int,
        constants: Arrays | None = None,
    ) -> None:
        """Make the memory large enough if it is not. Raises PlacementError."""
        self._constants = constants or {}
        self._slices = layout.slices(workers)
        head = _head_bytes(workers)
        self._map = shared_memory.reserve(
            fd,
            num_bytes(layout, workers),
            "Keeping two snapshots in memory",
            "Free some memory, or train a smaller model.",
        )
        halves = np.split(np.frombuffer(self._map, np.uint8), 2)
        self._slots = [_slot(half, layout, workers, head) for half in halves]
        self._next = 0

    def save(
        self,
        rank: int,
        parameters: Floats,
        states: Sequence[Floats],
        step: int,
        rest: tuple[Floats, JsonObject] | None,
    ) -> int:
        """Save one worker's slices of a step; rank 0 adds tail and progress (`rest`).

        All workers save the same steps. Returns the index of the slot.
        """
        slot, part = self._slots[self._next], slice(*self._slices[rank])
        slot.marks[rank] = NOTHING
        slot.state.parameters[part] = parameters
        for own, state in zip(slot.state.states, states, strict=True):
            own[part] = state
        if rest is not None:
            slot.state.tail[:] = rest[0]
            _write_text(slot.progress, json.dumps(rest[1]))
        slot.marks[rank, 1] = _checksum(slot.state, slot.progress, part, rank)
        slot.marks[rank, 0] = step + 1
        written, self._next = self._next, 1 - self._next
        return written

    def fill(self, state: State) -> None:
        """Make a state the newest: the supervisor does so before the workers start."""
        for rank, (first, end) in enumerate(self._slices):
            self._next = 0
            rest = (state.tail, state.progress) if rank == 0 else None
            parts = state.parameters[first:end], list(state.states[:, first:end])
            self.save(rank, *parts, state.step, rest)

    def read(self, index: int) -> State | None:
        """Return a copy of a slot; None if it is not complete."""
        slot = self._slots[index]
        marks = slot.marks.copy()
        if marks[0, 0] == NOTHING or not (marks[:, 0] == marks[0, 0]).all():
            return None
        progress = slot.progress.copy()
        # Copies are checked, not the slot: a dying worker may still write there.
        state = State(
            {},
            slot.state.parameters.copy(),
            slot.state.states.copy(),
            slot.state.tail.copy(),
            self._constants,
        )
        for rank, part in enumerate(self._slices):
            if _checksum(state, progress, slice(*part), rank) != marks[rank, 1]:
                return None
        state.progress = parse_json(_read_text(progress))
        return state if state.step + 1 == marks[0, 0] else None

    def newest(self) -> State | None:
        """Return a copy of the newest complete slot."""
        states = [state for state in map(self.read, range(2)) if state]
        return max(states, key=lambda state: state.step, default=None)

    def follow(self) -> State | None:
        """Return the newest state, when a worker starts; it saves to the other slot."""
        states = [self.read(index) for index in range(2)]
        steps = [state.step if state else -1 for state in states]
        newest = int(np.argmax(steps))
        self._next = 1 - newest if states[newest] else 0
        return states[newest]


def num_bytes(layout: Layout, workers: int) -> int:
    """Return the size of the memory with both slots."""
    elements = layout.size * (1 + len(layout.states)) + layout.kept_tail
    return 2 * (_head_bytes(workers) + shared_memory.pages(layout.itemsize * elements))


def _head_bytes(workers: int) -> int:
    return shared_memory.pages(PROGRESS_BYTES + 16 * workers)


def _slot(piece: NDArray[np.uint8], layout: Layout, workers: int, head: int) -> _Slot:
    size, num_states = layout.size, len(layout.states)
    floats = piece[head:].view(layout.dtype)
    parameters, states, tail = np.split(floats, [size, size * (1 + num_states)])
    marks = piece[PROGRESS_BYTES : PROGRESS_BYTES + 16 * workers].view(np.int64)
    state = State(
        {}, parameters, states.reshape(num_states, size), tail[: layout.kept_tail]
    )
    return _Slot(piece[:PROGRESS_BYTES], marks.reshape(workers, 2), state)


def _checksum(state: State, progress: NDArray[np.uint8], part: slice, rank: int) -> int:
    """Return the CRC-32 of one worker's part; that of rank 0 has tail and progress."""
    checksum = zlib.crc32(state.parameters[part].data)
    for row in state.states:
        checksum = zlib.crc32(row[part].data, checksum)
    if rank == 0:
        checksum = zlib.crc32(state.tail.data, checksum)
        checksum = zlib.crc32(_read_text(progress), checksum)
    return checksum


def _write_text(area: NDArray[np.uint8], text: str) -> None:
    raw = text.encode()
    area[:8].view(np.int64)[0] = len(raw)
    area[8 : 8 + len(raw)] = np.frombuffer(raw, np.uint8)


def _read_text(area: NDArray[np.uint8]) -> bytes:
    length = int(area[:8].view(np.int64)[0])
    return area[8 : 8 + length].tobytes()
