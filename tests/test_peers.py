"""Memory and processes that workers find by themselves."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from samestep import PeerLost, WorkerLate
from samestep.system import barrier, shared_memory
from samestep.system.barrier import Barrier, Patience, Waits
from samestep.system.peers import Address, Peers


FDS = Path("/proc/self/fd")


def test_another_process_finds_the_memory() -> None:
    with shared_memory.temporary(8) as fd:
        script = (
            "import os; from samestep.system.peers import Address; "
            f"os.write({Address.of(fd)!r}.open(), b'found')"
        )
        subprocess.run(
            [sys.executable, "-c", script.replace("write(Address", "write(Address")],
            check=True,
        )
        assert os.pread(fd, 5, 0) == b"found"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boot_id": "another"}, "another machine"),
        ({"inode": 1}, "another container"),
        ({"fd": 10_000}, "another container"),
        ({"pid": 2**22 + 1}, "another container"),
    ],
)
def test_memory_of_elsewhere_is_not_taken_for_that_of_the_first_worker(
    wrong: dict[str, Any], message: str
) -> None:
    with shared_memory.temporary() as fd:
        before = set(FDS.iterdir())
        with pytest.raises(OSError, match=message):
            Address.of(fd)._replace(**wrong).open()
        assert set(FDS.iterdir()) <= before


def test_processes_that_have_ended_are_known_by_their_rank() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    crew = [subprocess.Popen(sleep) for _ in range(2)]
    peers = Peers({rank: process.pid for rank, process in enumerate(crew, 5)})
    assert peers.ended() == []
    for number, process in enumerate(crew, 1):
        process.kill()
        process.wait()
        assert peers.ended() == [5, 6][:number]


class Ended(Peers):
    """Peers without processes."""

    def __init__(self, ranks: list[int]) -> None:
        self._ended = ranks

    def ended(self) -> list[int]:
        return self._ended


@contextmanager
def ends(workers: int, waits: Waits) -> Iterator[list[Barrier]]:
    """Yield each worker's end of a barrier."""
    fd = barrier.create(workers)
    memory = shared_memory.reserve(fd, barrier.header_bytes(workers), "A test", "")
    os.close(fd)
    yield [Barrier(memory, rank, workers, waits) for rank in range(workers)]


def test_a_worker_that_ended_before_a_wait_is_named() -> None:
    waits = Waits(0.0, 60.0, peers=Ended([1]))
    with (
        ends(2, waits) as (first, _),
        pytest.raises(PeerLost, match="worker 1 has ended before"),
    ):
        first.wait(Patience(0.0))


class Slow(list[Any]):
    """Rounds of a worker that rests between them."""

    def __iter__(self) -> Iterator[Any]:
        for pair in super().__iter__():
            yield pair
            time.sleep(0.5)


def test_a_worker_that_ended_after_it_passed_is_not_missed() -> None:
    """Of four, the first may be through while the second waits for the last."""
    passed: list[int] = []
    with ends(4, Waits(0.0, 60.0, peers=Ended(passed))) as all_ends:
        all_ends[3]._rounds = Slow(all_ends[3]._rounds)

        def work(rank: int) -> None:
            all_ends[rank].wait(Patience(0.0))
            passed.append(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(passed) == [0, 1, 2, 3]


def test_a_late_worker_is_told_the_option_of_whoever_started_it() -> None:
    waits = Waits(0.0, 0.1, timeout_option="`timeout_seconds`")
    with (
        ends(2, waits) as (first, _),
        pytest.raises(WorkerLate, match=r"late: worker 1\..*`timeout_seconds`"),
    ):
        first.wait(Patience(0.0))
