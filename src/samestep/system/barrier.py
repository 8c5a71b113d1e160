"""A barrier for the processes of one machine, in shared memory.

A dissemination barrier (Hensgen, Finkel and Manber 1988): in round k, worker r posts to
worker r + 2^k and waits for worker r - 2^k (modulo the number of workers); after
ceil(log2(workers)) rounds every worker knows that all have arrived. Each (worker,
round) has a process-shared POSIX semaphore of its own, with one poster and one waiter.

Why this is correct on weakly ordered processors: POSIX says that sem_post, sem_trywait
and sem_timedwait synchronise memory (XBD 4.12). What a worker wrote before its post is
visible to the worker that took the post, and, since each worker's rounds follow each
other, to all workers that this one posts to later.

A wait spins for a short time, then sleeps in the kernel. The time to spin is learnt for
each place in a step (`Patience`).
"""

import ctypes
import errno
import mmap
import os
import time

from samestep.errors import WorkerLate
from samestep.system import shared_memory


SEMAPHORE_BYTES = 64
"""A cache line each; glibc's sem_t takes 32 bytes."""
WORDS = SEMAPHORE_BYTES // 8
LEAST_SPIN_SECONDS = 20e-6
STARTING_WAITS = 3
"""Waits that may take the start timeout, since others may still load or compile."""
SLEEP_SECONDS = 0.2
"""A sleep is cut into such parts, since sem_timedwait counts by the wall clock, which
may jump."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# CDLL releases the GIL, for a call that may sleep; PyDLL keeps it, for a few
# instructions.
_sleeping = ctypes.CDLL(None, use_errno=True)
_quick = ctypes.PyDLL(None, use_errno=True)


def num_rounds(workers: int) -> int:
    """Return the number of rounds of one barrier."""
    return (workers - 1).bit_length()


def create(workers: int) -> int:
    """Create nameless memory that begins with the semaphores; return its descriptor.

    Raises OSError if the system has no such memory or no process-shared semaphores.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, "this system has no nameless shared memory (memfd)")
    fd = shared_memory.create(header_bytes(workers))
    try:
        with mmap.mmap(fd, header_bytes(workers)) as header:
            for index in range(workers, header_bytes(workers) // SEMAPHORE_BYTES):
                _check(_quick.sem_init(_address(header, index), 1, 0))
    except OSError:
        os.close(fd)
        raise
    return fd


def header_bytes(workers: int) -> int:
    """Return the size of the counters and semaphores of all workers."""
    return workers * (num_rounds(workers) + 1) * SEMAPHORE_BYTES


class Patience:
    """How long a worker spins before it sleeps, at one place in a step.

    The time doubles, up to a limit, after a wait within this limit, and halves after a
    longer one. So where waits are long, because a peer has more work or the machine is
    busy, a worker soon leaves its core to others.
    """

    def __init__(self, most_seconds: float) -> None:
        self.seconds = self._most_seconds = most_seconds

    def learn(self, waited: float) -> None:
        """Adapt to the seconds of one wait."""
        if waited <= self._most_seconds:
            self.seconds = min(2 * self.seconds, self._most_seconds)
        else:
            self.seconds = max(self.seconds / 2, LEAST_SPIN_SECONDS)


class Barrier:
    """One worker's end of the barrier; all workers call `wait` equally often."""

    def __init__(
        self,
        shared: mmap.mmap,
        rank: int,
        workers: int,
        timeout_seconds: float,
        first_rank: int = 0,
        start_seconds: float = 0.0,
    ) -> None:
        """Use `shared`, a map of the memory that `create` made.

        The rank of this machine's first worker among those of all machines is
        `first_rank`, for error messages. The first waits may take `start_seconds` if
        that is longer than the timeout.
        """
        self._start_seconds = max(start_seconds, timeout_seconds)
        self._first_rank = first_rank
        self._rank = rank
        self._workers = workers
        self._timeout_seconds = timeout_seconds
        self._posted = memoryview(shared)[: workers * SEMAPHORE_BYTES].cast("q")
        self._count = 0

        def semaphore(worker: int, round_: int) -> ctypes.c_void_p:
            return _address(shared, workers + worker * num_rounds(workers) + round_)

        self._rounds = [
            (semaphore((rank + (1 << k)) % workers, k), semaphore(rank, k))
            for k in range(num_rounds(workers))
        ]

    def wait(self, patience: Patience) -> None:
        """Wait for all workers. Raises WorkerLate, which names the late ones."""
        self._count += 1
        for number, (theirs, own) in enumerate(self._rounds):
            _quick.sem_post(theirs)
            # The number of rounds posted so far; only `_raise_late` needs it.
            before = (self._count - 1) * len(self._rounds)
            self._posted[self._rank * WORDS] = before + number + 1
            if _quick.sem_trywait(own):
                start = time.monotonic()
                self._spin_or_sleep(own, start, start + patience.seconds)
                patience.learn(time.monotonic() - start)

    def _spin_or_sleep(
        self, semaphore: ctypes.c_void_p, start: float, end: float
    ) -> None:
        while time.monotonic() < end:
            if not _quick.sem_trywait(semaphore):
                return
        while time.monotonic() < start + self._most_seconds:
            if not _sleeping.sem_timedwait(semaphore, _wall_clock(SLEEP_SECONDS)):
                return
            if ctypes.get_errno() not in (errno.ETIMEDOUT, errno.EINTR):
                _check(-1)
        self._raise_late()

    @property
    def _most_seconds(self) -> float:
        is_starting = self._count <= STARTING_WAITS
        return self._start_seconds if is_starting else self._timeout_seconds

    def _raise_late(self) -> None:
        late = [
            str(self._first_rank + rank)
            for rank in range(self._workers)
            if not self._waits(rank)
        ]
        is_starting = self._most_seconds > self._timeout_seconds
        raise WorkerLate.naming(
            f"worker {', '.join(late)}",
            "Every worker must reach the exchange",
            self._most_seconds,
            "`--start-timeout`" if is_starting else "`--hang-timeout`",
        )

    def _waits(self, rank: int) -> bool:
        """Return whether the post that the worker waits for has not been made."""
        posted = self._posted[rank * WORDS]
        distance = 1 << ((posted - 1) % len(self._rounds))
        source = (rank - distance) % self._workers
        return bool(posted) and self._posted[source * WORDS] < posted


def _wall_clock(seconds: float) -> ctypes.c_void_p:
    end = time.time_ns() + int(seconds * 1e9)
    moment = _Timespec(end // 1_000_000_000, end % 1_000_000_000)
    return ctypes.cast(ctypes.pointer(moment), ctypes.c_void_p)


def _address(shared: mmap.mmap, index: int) -> ctypes.c_void_p:
    start = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    return ctypes.c_void_p(start + index * SEMAPHORE_BYTES)


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
