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
from dataclasses import dataclass

from samestep.errors import PeerLost, WorkerLate
from samestep.system import shared_memory
from samestep.system.machine import usable_cores
from samestep.system.peers import Peers


SEMAPHORE_BYTES = 64
"""A cache line each; glibc's sem_t takes 32 bytes."""
WORDS = SEMAPHORE_BYTES // 8
SPIN_SECONDS = 2e-3
"""How long a worker with a core of its own spins before it sleeps, at most. Most waits
end sooner, and waking up takes 30 to 60 us."""
CROWDED_SPIN_SECONDS = 50e-6
"""The same where workers share cores: the awaited worker may need this one."""
LEAST_SPIN_SECONDS = 20e-6
STARTING_WAITS = 3
"""Waits that may take the start timeout, since others may still load or compile."""
SLEEP_SECONDS = 0.05
"""A sleep is cut into such parts, since sem_timedwait counts by the wall clock, which
may jump, and since peers may end."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# CDLL releases the GIL, for a call that may sleep; PyDLL keeps it, for a few
# instructions.
_sleeping = ctypes.CDLL(None, use_errno=True)
_quick = ctypes.PyDLL(None, use_errno=True)


def spin_seconds(workers: int) -> float:
    """Return how long to spin, at most, with this number of workers on this machine."""
    return CROWDED_SPIN_SECONDS if workers > usable_cores()[0] else SPIN_SECONDS


@dataclass(frozen=True)
class Waits:
    """How a worker waits for the others of its machine."""

    spin_seconds: float
    timeout_seconds: float
    start_seconds: float = 0.0
    """The first waits may take so long, if that is longer."""
    timeout_option: str = "`--hang-timeout`"
    """What sets the timeout, for error messages."""
    peers: Peers | None = None
    """Where no supervisor ends those that wait for one that has ended."""


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
        waits: Waits,
        first_rank: int = 0,
    ) -> None:
        """Use `shared`, a map of the memory that `create` made.

        The rank of this machine's first worker among those of all machines is
        `first_rank`, for error messages.
        """
        self._waits = waits
        self._first_rank = first_rank
        self._rank = rank
        self._workers = workers
        self._posted = memoryview(shared)[: workers * SEMAPHORE_BYTES].cast("q")
        self._count = 0
        self._has_arrived = False

        def semaphore(worker: int, round_: int) -> ctypes.c_void_p:
            return _address(shared, workers + worker * num_rounds(workers) + round_)

        self._rounds = [
            (semaphore((rank + (1 << k)) % workers, k), semaphore(rank, k))
            for k in range(num_rounds(workers))
        ]

    def wait(self, patience: Patience) -> None:
        """Wait for all workers.

        Raises WorkerLate, which names the late ones, or PeerLost.
        """
        self.arrive(patience)
        self.finish(patience)

    def arrive(self, patience: Patience) -> None:
        """Tell the others that this worker is here, and wait for them in `finish`.

        Between the two, it may do what they need not wait for. (A fuzzy barrier: Gupta
        1989.) Raises as `wait`.
        """
        self.finish(patience)
        self._count += 1
        self._has_arrived = True
        if self._rounds:
            self._post(0)

    def finish(self, patience: Patience) -> None:
        """Wait for all workers, if this one has arrived. Raises as `wait`."""
        if not self._has_arrived:
            return
        self._has_arrived = False
        for number, (_, own) in enumerate(self._rounds):
            if number:
                self._post(number)
            if _quick.sem_trywait(own):
                start = time.monotonic()
                self._spin_or_sleep(own, start, start + patience.seconds)
                patience.learn(time.monotonic() - start)

    def _post(self, number: int) -> None:
        _quick.sem_post(self._rounds[number][0])
        # The number of rounds posted so far; only `_raise_late` needs it.
        before = (self._count - 1) * len(self._rounds)
        self._posted[self._rank * WORDS] = before + number + 1

    def _spin_or_sleep(
        self, semaphore: ctypes.c_void_p, start: float, end: float
    ) -> None:
        while time.monotonic() < end:
            if not _quick.sem_trywait(semaphore):
                return
        while time.monotonic() < start + self._most_seconds:
            self._check_peers()
            if not _sleeping.sem_timedwait(semaphore, _wall_clock(SLEEP_SECONDS)):
                return
            if ctypes.get_errno() not in (errno.ETIMEDOUT, errno.EINTR):
                _check(-1)
        self._raise_late()

    @property
    def _most_seconds(self) -> float:
        waits, is_starting = self._waits, self._count <= STARTING_WAITS
        most = max(waits.start_seconds, waits.timeout_seconds)
        return most if is_starting else waits.timeout_seconds

    def _check_peers(self) -> None:
        """Raise PeerLost if a worker has ended that has not passed this wait."""
        ended = self._waits.peers.ended() if self._waits.peers else []
        posts = self._count * len(self._rounds)
        lost = [str(r) for r in ended if self._posted[r * WORDS] < posts]
        if lost:
            raise PeerLost(
                "All workers take part in every exchange, to the end; worker "
                f"{', '.join(lost)} has ended before. Its own output says why."
            )

    def _raise_late(self) -> None:
        late = [
            str(self._first_rank + rank)
            for rank in range(self._workers)
            if not self._is_waiting(rank)
        ]
        is_starting = self._most_seconds > self._waits.timeout_seconds
        raise WorkerLate.naming(
            f"worker {', '.join(late)}",
            "Every worker must reach the exchange",
            self._most_seconds,
            "`--start-timeout`" if is_starting else self._waits.timeout_option,
        )

    def _is_waiting(self, rank: int) -> bool:
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
