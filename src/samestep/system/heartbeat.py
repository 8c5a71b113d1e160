"""What workers and their supervisor tell each other without messages.

One small array in nameless shared memory. The supervisor sets `stop`; each worker
counts its micro-batches (`beats`), the exchanges that it has reached (`rounds`), its
step, and what it does before the first one (`phase`). A cell has one writer and is
only a hint, so no ordering is needed.
"""

import mmap

from samestep.system import shared_memory


STOP, CELLS = 0, 4
BEATS, ROUNDS, STEP, PHASE = range(4)
PHASES = (
    "starting",
    "loading the data",
    "building the model",
    "waiting for the other workers",
    "compiling the model",
)
"""What a worker does before its first step, in this order."""
STARTING, LOADING, BUILDING, MEETING, COMPILING = range(len(PHASES))


class Heartbeat:
    """A map of the memory that `create` made."""

    def __init__(self, fd: int, rank: int = 0) -> None:
        """A worker gives its rank; the supervisor does not need one."""
        self._all = memoryview(mmap.mmap(fd, 0)).cast("q")
        self._own = self._all[CELLS * (rank + 1) :][:CELLS]

    @staticmethod
    def create(workers: int) -> int:
        """The descriptor of a new board. Raises OSError."""
        return shared_memory.create(8 * CELLS * (workers + 1))

    def enter(self, phase: int) -> None:
        """A worker: what it does now, before its first step."""
        self._own[PHASE] = phase

    def beat(self) -> None:
        """A worker: another piece of work begins."""
        self._own[BEATS] += 1

    def at_barrier(self) -> None:
        """A worker: from now on it waits for the others."""
        self._own[ROUNDS] += 1

    def begin(self, step: int) -> None:
        """A worker: a step begins, counted from 0 over all epochs."""
        self._own[STEP] = step

    @property
    def stop(self) -> bool:
        """Whether the supervisor wants the training to stop with a snapshot."""
        return bool(self._all[STOP])

    def request_stop(self) -> None:
        """The supervisor: as soon as all workers can."""
        self._all[STOP] = 1

    @property
    def phase(self) -> str:
        """The supervisor: what the last workers do before their first step, or ""."""
        cells = self.workers()
        has_begun = all(cell[BEATS] or cell[ROUNDS] for cell in cells)
        return "" if has_begun else PHASES[min(cell[PHASE] for cell in cells)]

    def workers(self) -> list[tuple[int, int, int, int]]:
        """The supervisor: (beats, rounds, step, phase) of each worker."""
        count = len(self._all) // CELLS - 1
        cells = self._all.tolist()
        starts = (CELLS * (rank + 1) for rank in range(count))
        return [
            (cells[s + BEATS], cells[s + ROUNDS], cells[s + STEP], cells[s + PHASE])
            for s in starts
        ]
