"""Steps whose micro-batches a second worker computes, too: `--verify`.

A processor or a memory that is wrong now and then gives wrong gradients, and nothing
else would notice. In a step that is drawn by the seed, each worker computes the
micro-batches of another one as well. Before the update all compare hashes of what goes
into the sums: the partials of the gradient with their buffers, the losses, the metrics.
All micro-batches of such a step are checked rather than a few of every step: so all
workers have as much more to compute, and each still computes its share at once.

If two workers differ, all of them compute these micro-batches again. The majority is
right; of two workers, the one whose own result changes is wrong. It ends with an error,
and the supervisor goes on from the last snapshot with another process in its place. On
several machines torchrun does, and workers are checked by those of another machine.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from samestep.core import tree
from samestep.core.gradient_noise import Watch
from samestep.core.ownership import Share
from samestep.core.plan import derive_seed
from samestep.errors import NotReproducible, PeerLost, WorkerWrong
from samestep.exchange import Exchange, gather_cells
from samestep.exchange.autograd import Instruments
from samestep.messages.training import WrongWorker
from samestep.state.flat import Flat
from samestep.state.hashing import MASK, hash_of
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.verification.one_by_one import Passes


LOW = 0xFFFFFFFF
FLIPPED = 1 << 20
"""The bit of a gradient that an injected fault inverts."""


class Monitor(Instruments, Protocol):
    """What watches a worker's own micro-batches: `training.monitor.StepMonitor`."""

    def recorded(self, micro_batches: Share) -> NDArray[np.float64]:
        """Return the loss and the metrics of each micro-batch."""


@dataclass
class Notes:
    """Keeps what is measured of micro-batches that count for another worker."""

    heartbeat: Heartbeat
    _cells: list[list[float]] = field(default_factory=list)

    def begin_micro_batch(self) -> None:
        """Show that there is progress."""
        self.heartbeat.beat()

    def lap(self, phase: str) -> float:
        """Measure nothing."""
        return 0.0

    def record(self, index: int, loss: float, metrics: list[float]) -> None:
        """Keep the sums of the next micro-batch."""
        self._cells.append([loss, *metrics])

    def end_micro_batch(
        self, index: int, loss: Tensor, metrics: Tensor, num_samples: int
    ) -> None:
        """Keep them."""
        self.record(index, loss.item(), metrics.tolist())

    def record_hash(self, index: int, number: int) -> None:
        """Do nothing: the owner of the micro-batch records it."""

    def read_less(self, num_bytes: int) -> None:
        """Do nothing."""

    def recorded(self, micro_batches: Share) -> NDArray[np.float64]:
        """Return all that was kept."""
        return np.array(self._cells, dtype=np.float64)


@dataclass(frozen=True)
class Verifier:
    """One worker's part of the steps that are computed twice."""

    share: float
    """The share of steps that are computed twice."""
    seed: int
    rank: int
    flat: Flat
    exchange: Exchange
    heartbeat: Heartbeat
    faults: Faults
    hosts: Sequence[str] = ()
    """The host of each worker; empty: all are on this machine."""

    def is_due(self, step: int) -> bool:
        """Return whether a step, counted from 0, is computed by `run`."""
        return self._is_drawn(step) or self.faults.flips(step)

    def _is_drawn(self, step: int) -> bool:
        return self.share > 0 and self._number(step) < self.share * (1 << 63)

    def _number(self, step: int) -> int:
        return derive_seed(self.seed, "verify", step)

    def run(self, step: int, passes: Passes, monitor: Monitor) -> None:
        """All workers: compute the own micro-batches of a step, and check those.

        Raises WorkerWrong in the worker that was wrong, PeerLost in the others;
        NotReproducible if it is not known which one was.
        """
        own, partials = self.exchange.shares[self.rank], self.exchange.partials()
        is_drawn, theirs = self._is_drawn(step), 0
        if is_drawn:
            theirs = self._again(step, self._checked_by(self.rank, step), passes)
            monitor.lap("other")
        passes.write(step, own, partials, monitor)
        if self.faults.take_flip(step):
            _flip(partials[0])
        if is_drawn:
            ours = digest(partials, monitor.recorded(own))
            self._compare(step, ours, theirs, passes)

    def _checked_by(self, rank: int, step: int) -> int:
        """Return whose micro-batches a worker computes besides its own.

        It is drawn, so that all whom `distances` allows check a worker in turn. One
        that is alone checks itself.
        """
        workers = self.exchange.workers
        if workers == 1:
            return rank
        allowed = distances(self.hosts or [""] * workers)
        return (rank + allowed[self._number(step) % len(allowed)]) % workers

    def _again(self, step: int, owner: int, passes: Passes) -> int:
        """Compute a worker's micro-batches into memory of its own; return the hash."""
        flat, share = self.flat, self.exchange.shares[owner]
        rows = len(tree.subtrees(share, self.exchange.shares[-1][1]))
        memory = flat.saved_buffers().new_zeros(rows, flat.size + flat.tail)
        partials, notes = list(memory), Notes(self.heartbeat)
        with _unwatched(self.exchange.watch):
            passes.write(step, share, partials, notes)
        return digest(partials, notes.recorded(share))

    def _compare(self, step: int, ours: int, theirs: int, passes: Passes) -> None:
        """All workers: compare each own result with that of the second worker."""
        results = self._gather(ours, theirs)
        for second in range(self.exchange.workers):
            owner = self._checked_by(second, step)
            pair = (owner, results[owner][0]), (second, results[second][1])
            if pair[0][1] == pair[1][1]:
                continue
            again = self._gather(self._again(step, owner, passes))
            wrong = wrong_worker(pair, [answer for (answer,) in again])
            self._end(step, owner, second, wrong)

    def _gather(self, *hashes: int) -> list[list[int]]:
        """All workers: return the hashes of each, by rank."""
        self.heartbeat.at_barrier()
        # Halves of 32 bits are exact in float64.
        cells = [half for number in hashes for half in (number >> 32, number & LOW)]
        rows = gather_cells(self.exchange, self.rank, cells)
        return [
            [
                (int(high) << 32) + int(low)
                for high, low in zip(row[::2], row[1::2], strict=True)
            ]
            for row in rows
        ]

    def _end(self, step: int, owner: int, second: int, wrong: int | None) -> NoReturn:
        """All workers: end, since two of them differ."""
        first, end = self.exchange.shares[owner]
        where = f"micro-batches {first} to {end - 1} of step {step + 1}"
        one, other = self._title(owner), self._title(second)
        if wrong is None:
            raise NotReproducible(
                "Two workers must get the same gradients from the same micro-batches; "
                f"{one} and {other} differ in {where}, and computing "
                "them again did not show which is wrong. Code of your own that depends "
                "on its process is the usual cause (`samestep check` looks for it); "
                "else a processor or memory is, and with three workers or more the "
                "majority decides."
            )
        text = (
            "Two workers must get the same gradients from the same micro-batches; in "
            f"{where} they differed, and {self._title(wrong)} was wrong. A fault of "
            "its processor or memory is likely; `samestep audit` checks earlier steps, "
            "too."
        )
        error = WorkerWrong(text) if wrong == self.rank else PeerLost(text)
        host = self.hosts[wrong] if self.hosts else None
        error.details = {"wrong": WrongWorker(step=step + 1, worker=wrong, host=host)}
        raise error

    def _title(self, rank: int) -> str:
        """Return the name of a worker in messages."""
        return f"worker {rank}" + (f" on {self.hosts[rank]}" if self.hosts else "")


def distances(hosts: Sequence[str]) -> range:
    """Return how many ranks may lie between a worker and the one that checks it.

    The workers of a host have consecutive ranks. Two of one host check each other only
    where it has more workers than all others together, and then as few as possible.
    """
    workers, largest = len(hosts), max(Counter(hosts).values())
    least, most = sorted((largest, workers - largest))
    return range(max(1, least), min(most, workers - 1) + 1)


def digest(partials: Sequence[Tensor], recorded: NDArray[np.float64]) -> int:
    """Return a hash of what micro-batches add to the sums of a step."""
    total = place = 0
    for vector in (*(p.cpu().numpy() for p in partials), recorded.ravel()):
        total += hash_of(vector, place)
        place += len(vector)
    return total & MASK


def wrong_worker(pair: Sequence[tuple[int, int]], again: Sequence[int]) -> int | None:
    """Return which of two workers was wrong; None if that is not known.

    `pair` has each with its result, `again` are the later results of all workers: what
    most of them have is right. Without a majority, who changes its result was wrong.
    """
    ((most, votes),) = Counter(again).most_common(1)
    wrong = {worker for worker, result in pair if result != most}
    if 2 * votes <= len(again):
        wrong = {worker for worker, result in pair if result != again[worker]}
    return wrong.pop() if len(wrong) == 1 else None


@contextmanager
def _unwatched(watch: Watch) -> Iterator[None]:
    """Keep gradients from being noted that count for another worker."""
    watch.active, before = False, watch.active
    try:
        yield
    finally:
        watch.active = before


def _flip(partial: Tensor) -> None:
    """Invert a bit of the largest element."""
    values = partial.numpy()
    values.view(f"u{values.itemsize}")[np.abs(values).argmax()] ^= FLIPPED
