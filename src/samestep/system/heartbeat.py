"""The workers' heartbeats and the supervisor's stop flag, in nameless shared memory.

The supervisor sets `stop`, and notes up to which step it has `handled` snapshots. Each
worker counts its micro-batches (`beats`) and the exchanges that it has reached
(`rounds`), and notes its step and, before the first step, its phase. A cell has one
writer and is only a hint, so no memory ordering is needed.
"""

import mmap

from samestep.system import shared_memory


STOP, HANDLED, CELLS = 0, 1, 4
BEATS, ROUNDS, STEP, PHASE = range(4)
PHASES = (
    "starting",
    "loading the data",
    "building the model",
    "waiting for the other workers",
    "compiling the model",
)
"""The phases of a worker before its first step, in their order."""
STARTING, LOADING, BUILDING, MEETING, COMPILING = range(len(PHASES))


class Heartbeat:
    """One process's map of the memory that `create` made."""

    def __init__(self, fd: int, rank: int = 0) -> None:
        """Map the memory. A worker gives its rank; the supervisor needs none."""
        self._all = memoryview(mmap.mmap(fd, 0)).cast("q")
        self._own = self._all[CELLS * (rank + 1) :][:CELLS]

    @staticmethod
    def create(workers: int) -> int:
        """Create the memory; return its descriptor. Raises OSError."""
        return shared_memory.create(8 * CELLS * (workers + 1))

    def enter(self, phase: int) -> None:
        """Worker: note the phase, before the first step."""
        self._own[PHASE] = phase

    def beat(self) -> None:
        """Worker: note that another micro-batch begins."""
        self._own[BEATS] += 1

    def at_barrier(self) -> None:
        """Worker: note that it waits for the others from now on."""
        self._own[ROUNDS] += 1

    def begin(self, step: int) -> None:
        """Worker: note the step that begins, counted from 0 over all epochs."""
        self._own[STEP] = step

    @property
    def stop(self) -> bool:
        """Whether the supervisor asks for a stop with a snapshot."""
        return bool(self._all[STOP])

    def request_stop(self) -> None:
        """Supervisor: ask all workers to stop after a step, with a snapshot."""
        self._all[STOP] = 1

    @property
    def handled(self) -> int:
        """The step of the newest snapshot that the supervisor has dealt with."""
        return int(self._all[HANDLED])

    def handle(self, step: int) -> None:
        """Supervisor: note that it has copied the snapshot of a step, or wants none."""
        self._all[HANDLED] = step

    @property
    def phase(self) -> str:
        """The phase of the slowest worker; empty once all are past their start."""
        cells = self.workers()
        has_begun = all(cell[BEATS] or cell[ROUNDS] for cell in cells)
        return "" if has_begun else PHASES[min(cell[PHASE] for cell in cells)]

    def workers(self) -> list[tuple[int, int, int, int]]:
        """Supervisor: return (beats, rounds, step, phase) of each worker."""
        cells = self._all[CELLS:].tolist()
        columns = (cells[kind::CELLS] for kind in (BEATS, ROUNDS, STEP, PHASE))
        return list(zip(*columns, strict=True))
