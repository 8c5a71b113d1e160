"""When ownership follows speed: measurements in, a decision out.

Every worker has one of these and feeds it the same merged numbers. What changes is
decided by rank 0's alone (`proposal`, `straggler_to_drop`) and sent to all with the
next merge: two machines may round the same floats to different decisions.
"""

import math
import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from samestep.core import ownership
from samestep.core.ownership import Share


LEAST_SECONDS = 0.15
"""An observation lasts so long: very short ones are only noise."""
WINDOW = 5
"""Observations that a worker's measured speed is the mean of."""
MOST_GROWTH = 0.3
GROWTH, IDLE = 2.0, 0.08
"""Per second, a worker that waits for the share w of the time is believed to become
faster by at most GROWTH * (w - IDLE), and by MOST_GROWTH. Under a CPU quota or beside
another process, who owns little seems faster than who owns more; but who could do much
more waits much. One that owns nothing is tried again in this way, too."""
WARM_UP = 2
"""Observations in the beginning that say nothing."""
DEADBAND, CONFIRMATIONS = 0.05, 15
"""So many observations in a row must promise to save more than this share of the time:
noise promises less."""
URGENT, URGENT_CONFIRMATIONS = 0.18, 3
"""The same for a change that promises much."""
MOST_FAILURES = 3
"""Each time that a worker got something and soon lost all of it, its growth is halved,
at most so often: trying a hopeless one again costs more than it can ever bring."""
MEMORY = 10.0
"""Seconds after which what a worker cost the others counts 1 / e."""
HINDERED_CONFIRMATIONS = 50
"""So many observations in a row in which a worker cost more than the deadband."""
LAGGING = 0.8
"""Below this share of the fastest's speed, a worker is one to tell about."""
COARSE = 0.9
"""Below this efficiency, the micro-batches are too few for the imbalance."""


@dataclass(frozen=True)
class Change:
    """A new ownership and why."""

    before: list[Share]
    after: list[Share]
    speeds_before: list[float]
    """When ownership last changed, or as first measured."""
    speeds: list[float]
    gain: float
    """The predicted share of the time that it saves."""
    cause: str
    """`compute`, or `data` if the slowest worker mostly waits for its samples."""

    def to_dict(self) -> dict[str, Any]:
        """An event."""
        return {
            "before": [end - first for first, end in self.before],
            "after": [end - first for first, end in self.after],
            "speeds_before": self.speeds_before,
            "speeds": self.speeds,
            "gain": self.gain,
            "cause": self.cause,
        }


@dataclass(frozen=True)
class StepWindow:
    """Some steps; the lists are of each worker, in seconds."""

    steps: int
    seconds: float
    compute: Sequence[float]
    """All time from samples to gradients."""
    data: Sequence[float]
    """The part of it that went into the samples."""
    waiting: Sequence[float]
    """For other workers; not part of `compute`."""
    updating: Sequence[float]
    """Of the parameters; who owns no micro-batch still takes part in it."""

    def followed_by(self, other: "StepWindow") -> "StepWindow":
        """Both together."""
        names = ("compute", "data", "waiting", "updating")
        sums = [
            [a + b for a, b in zip(getattr(self, n), getattr(other, n), strict=True)]
            for n in names
        ]
        return StepWindow(self.steps + other.steps, self.seconds + other.seconds, *sums)


@dataclass(frozen=True)
class Straggler:
    """A worker without which the others would be faster."""

    worker: int
    speed: float
    """As a share of the fastest's."""
    gain: float
    """The predicted share of the time that leaving it out saves."""


@dataclass
class Balancer:
    """Decides for `auto`; `off` and a fixed ownership never change."""

    micro_batches: int
    owned: list[Share]
    is_live: bool = True
    drop_stragglers_below: float = 0.0
    speeds: list[float] = field(init=False)
    """Micro-batches per second that each worker is believed to reach; 0: unknown."""
    _seen: list[deque[tuple[float, float]]] = field(init=False)
    """(micro-batches, seconds of computing them) of each observation."""
    _data_share: list[float] = field(init=False)
    _failures: list[int] = field(init=False)
    _confirmed: int = 0
    _urgent: int = 0
    _hindered: int = 0
    _spent: float = 0.0
    """Seconds of computing and updating, decaying."""
    _needed: float = 0.0
    """What the others would have needed for the same without the slowest."""
    _told: set[int] = field(default_factory=set)
    _speeds_before: list[float] = field(default_factory=list)
    _warm_up: int = WARM_UP
    _stretch: StepWindow | None = None
    proposal: Change | None = None
    """Made by the observations so far, until all workers `adopt` that of rank 0."""
    straggler: Straggler | None = None
    """Found by the last observation; each worker is told of once."""
    seconds: float = 0.0
    """Seconds observed."""
    saved: float = 0.0
    """Seconds that an even ownership would have taken longer."""
    lag: dict[int, dict[str, float]] = field(default_factory=dict)
    """For how many `seconds` a worker was the slowest by far, and at which mean `speed`
    relative to the fastest."""

    def __post_init__(self) -> None:
        count = len(self.owned)
        self._seen = [deque(maxlen=WINDOW) for _ in range(count)]
        self.speeds, self._data_share = [0.0] * count, [0.0] * count
        self._failures = [0] * count

    def observe(self, stretch: StepWindow) -> None:
        """What all workers measured since the last call; perhaps makes a proposal."""
        if self._stretch is not None:
            stretch = self._stretch.followed_by(stretch)
        self._stretch, self.straggler = stretch, None
        if stretch.seconds < LEAST_SECONDS:
            return
        self._stretch = None
        self._warm_up -= 1
        if self._warm_up >= 0:
            return
        self._estimate(stretch)
        if not all(self.speeds) or float("inf") in self.speeds:
            return
        self._speeds_before = self._speeds_before or list(self.speeds)
        self._account(stretch.seconds)
        self.straggler = self._find_hindrance(stretch)
        if self.is_live and self.proposal is None:
            self._propose()

    def _estimate(self, stretch: StepWindow) -> None:
        for rank, (first, end) in enumerate(self.owned):
            compute = stretch.compute[rank]
            if end > first and compute > 0:
                self._seen[rank].append((stretch.steps * (end - first), compute))
                self._data_share[rank] = stretch.data[rank] / compute
            else:
                self._seen[rank].clear()
            if len(self._seen[rank]) == WINDOW:
                self._failures[rank] = 0
            waiting = stretch.waiting[rank] / stretch.seconds
            self.speeds[rank] = self._believed(rank, waiting, stretch.seconds)

    def _measured(self, rank: int) -> float:
        """The lower of a long and a short mean: being late costs more than idling."""
        seen = list(self._seen[rank])
        means = [
            sum(amount for amount, _ in part) / sum(time for _, time in part)
            for part in (seen, seen[-2:])
            if part
        ]
        return min(means, default=float("inf"))

    def _believed(self, rank: int, waiting: float, seconds: float) -> float:
        measured, before = self._measured(rank), self.speeds[rank]
        if not before or (waiting < IDLE and measured < float("inf")):
            return measured
        growth = min(MOST_GROWTH, GROWTH * max(0.0, waiting - IDLE))
        growth /= 1 << min(self._failures[rank], MOST_FAILURES)
        return min(measured, before * (1 + growth * seconds))

    @property
    def straggler_to_drop(self) -> int | None:
        """The worker that is to leave, if one has been too slow for long enough."""
        slowest = self.speeds.index(min(self.speeds))
        others = self.speeds[:slowest] + self.speeds[slowest + 1 :]
        if not others:
            return None
        least = self.drop_stragglers_below * statistics.median(others)
        first, end = self.owned[slowest]
        is_certain = len(self._seen[slowest]) == WINDOW or first == end
        return slowest if is_certain and self.speeds[slowest] < least else None

    def _account(self, seconds: float) -> None:
        even = ownership.shares(self.micro_batches, len(self.speeds))
        ratio = ownership.makespan(even, self.speeds)
        ratio /= ownership.makespan(self.owned, self.speeds)
        self.seconds += seconds
        self.saved += seconds * (ratio - 1)
        slowest = self.speeds.index(min(self.speeds))
        if self.speeds[slowest] < LAGGING * max(self.speeds):
            lag = self.lag.setdefault(slowest, {"seconds": 0.0, "speed": 0.0})
            relative = self.speeds[slowest] / max(self.speeds)
            lag["seconds"] += seconds
            lag["speed"] += (relative - lag["speed"]) * seconds / lag["seconds"]

    def _find_hindrance(self, stretch: StepWindow) -> Straggler | None:
        """Measured over a while, since trying a hopeless worker again costs, too."""
        if len(self.speeds) == 1:
            return None
        slowest = self.speeds.index(min(self.speeds))
        updates = [seconds / stretch.steps for seconds in stretch.updating]
        without = ownership.seconds_without(
            slowest, self.micro_batches, self.speeds, updates
        )
        spent = map(sum, zip(stretch.compute, stretch.updating, strict=True))
        decay = math.exp(-stretch.seconds / MEMORY)
        self._spent = decay * self._spent + max(spent)
        self._needed = decay * self._needed + stretch.steps * without
        gain = 1 - self._needed / self._spent
        self._hindered = self._hindered + 1 if gain > DEADBAND else 0
        if self._hindered < HINDERED_CONFIRMATIONS or slowest in self._told:
            return None
        self._told.add(slowest)
        return Straggler(slowest, self.speeds[slowest] / max(self.speeds), gain)

    def _propose(self) -> None:
        change = self._change(ownership.fastest(self.micro_batches, self.speeds))
        self._confirmed = self._confirmed + 1 if change.gain > DEADBAND else 0
        self._urgent = self._urgent + 1 if change.gain > URGENT else 0
        enough = self._confirmed >= CONFIRMATIONS, self._urgent >= URGENT_CONFIRMATIONS
        if any(enough):
            self.proposal = change

    def _change(self, after: list[Share]) -> Change:
        """To another ownership, as the speeds are now."""
        speeds = list(self.speeds)
        now = ownership.makespan(self.owned, speeds)
        gain = 1 - ownership.makespan(after, speeds) / now
        slowest = speeds.index(min(speeds))
        cause = "data" if self._data_share[slowest] > 0.5 else "compute"
        return Change(self.owned, after, self._speeds_before, speeds, gain, cause)

    def adopt(self, after: list[Share]) -> Change:
        """All workers, between two steps: the ownership that rank 0 proposed."""
        own, self.proposal = self.proposal, None
        change = own if own and own.after == after else self._change(after)
        self._confirmed = self._urgent = 0
        self._count_failures(after)
        self.owned, self._speeds_before = after, change.speeds
        return change

    def _count_failures(self, after: list[Share]) -> None:
        for rank, (first, end) in enumerate(after):
            if first == end and 0 < len(self._seen[rank]) < WINDOW:
                self._failures[rank] += 1

    def summary(self) -> dict[str, Any]:
        """What balancing gained, and whether more micro-batches would gain more."""
        speeds = self.speeds
        if not self.seconds:
            return {}
        efficiency = ownership.efficiency(self.micro_batches, speeds)
        found: dict[str, Any] = {
            "saved": self.saved / (self.seconds + self.saved),
            "speeds": speeds,
            "efficiency": efficiency,
            "lag": {str(rank): dict(lag) for rank, lag in self.lag.items()},
        }
        if efficiency < COARSE and len(speeds) > 1:
            found["enough_micro_batches"] = ownership.enough_micro_batches(
                self.micro_batches, speeds, COARSE
            )
        return found


def random_ownership(micro_batches: int, workers: int, step: int) -> list[Share]:
    """An ownership that changes with every step, for `--balance random`."""
    chance = random.Random(step)  # noqa: S311  not a secret
    cuts = sorted(chance.randint(0, micro_batches) for _ in range(workers - 1))
    return ownership.contiguous(
        [b - a for a, b in zip([0, *cuts], [*cuts, micro_batches], strict=True)]
    )
