"""When ownership follows speed: measurements in, a decision out.

Every worker has a balancer and feeds it the same merged numbers. Yet rank 0's alone
decides (`proposal`, `straggler_to_drop`), and its decision is sent to all with the next
merge: two machines may round the same floats to different decisions.

`core.speeds` estimates how fast each worker is, `core.straggler` finds one that the
others would be faster without, and the balancer decides about ownership.
"""

import random
import statistics
from dataclasses import dataclass, field
from itertools import pairwise

from samestep.core import ownership
from samestep.core.ownership import Share
from samestep.core.speeds import StepWindow, WorkerSpeed
from samestep.core.straggler import Straggler, StragglerDetector
from samestep.system.json_values import JsonObject


LEAST_SECONDS = 0.15
"""Shorter windows are joined to one observation: they are only noise."""
WARM_UP = 2
"""Observations at the beginning that are ignored."""
DEADBAND, CONFIRMATIONS = 0.05, 15
"""This many observations in a row must promise to save more than this share of the time
before ownership changes: noise promises less."""
URGENT, URGENT_CONFIRMATIONS = 0.18, 3
"""The same for a change that promises much."""
LAGGING = 0.8
"""A worker below this share of the fastest one's speed is in the summary."""
COARSE = 0.9
"""Below this efficiency, the micro-batches are too few for the imbalance."""


@dataclass(frozen=True)
class Change:
    """A new ownership and why."""

    before: list[Share]
    after: list[Share]
    speeds_before: list[float]
    """Speeds when ownership last changed, or as first measured."""
    speeds: list[float]
    gain: float
    """The predicted share of the time that it saves."""
    cause: str
    """`compute`, or `data` if the slowest worker mostly waits for its samples."""


@dataclass
class Confirmations:
    """How often in a row a change of ownership promised enough."""

    _worthwhile: int = 0
    _urgent: int = 0

    def confirm(self, gain: float) -> bool:
        """Take the gain that a change promises; return whether it is confirmed."""
        self._worthwhile = self._worthwhile + 1 if gain > DEADBAND else 0
        self._urgent = self._urgent + 1 if gain > URGENT else 0
        is_urgent = self._urgent >= URGENT_CONFIRMATIONS
        return is_urgent or self._worthwhile >= CONFIRMATIONS


@dataclass
class BalanceRecord:
    """What balancing gained so far, for the summary of a run."""

    micro_batches: int
    seconds: float = 0.0
    """Seconds observed."""
    saved: float = 0.0
    """Seconds that an even ownership would have taken longer."""
    lag: dict[int, dict[str, float]] = field(default_factory=dict)
    """For how many `seconds` a worker was the slowest by far, and at which mean `speed`
    relative to the fastest."""

    def add(self, seconds: float, owned: list[Share], speeds: list[float]) -> None:
        """Add `seconds` of training with this ownership and these speeds."""
        even = ownership.shares(self.micro_batches, len(speeds))
        ratio = ownership.makespan(even, speeds)
        ratio /= ownership.makespan(owned, speeds)
        self.seconds += seconds
        self.saved += seconds * (ratio - 1)
        slowest = speeds.index(min(speeds))
        if speeds[slowest] < LAGGING * max(speeds):
            lag = self.lag.setdefault(slowest, {"seconds": 0.0, "speed": 0.0})
            relative = speeds[slowest] / max(speeds)
            lag["seconds"] += seconds
            lag["speed"] += (relative - lag["speed"]) * seconds / lag["seconds"]

    def summary(self, speeds: list[float]) -> JsonObject:
        """Return the summary at the last `speeds`; empty if nothing was observed."""
        if not self.seconds:
            return {}
        efficiency = ownership.efficiency(self.micro_batches, speeds)
        summary: JsonObject = {
            "saved": self.saved / (self.seconds + self.saved),
            "speeds": speeds,
            "efficiency": efficiency,
            "lag": {str(rank): dict(lag) for rank, lag in self.lag.items()},
        }
        if efficiency < COARSE and len(speeds) > 1:
            summary["enough_micro_batches"] = ownership.enough_micro_batches(
                self.micro_batches, speeds, COARSE
            )
        return summary


@dataclass
class Balancer:
    """Propose ownership for `auto`; `off` and a fixed ownership never change."""

    micro_batches: int
    owned: list[Share]
    is_live: bool = True
    least_owned: int = 0
    """Micro-batches that each worker has in any case."""
    drop_stragglers_below: float = 0.0
    """Drop a worker below this share of the others' median speed."""
    proposal: Change | None = None
    """Made from the observations so far, until all workers `adopt` that of rank 0."""
    straggler: Straggler | None = None
    """Detected by the last observation."""
    _workers: list[WorkerSpeed] = field(init=False)
    _detector: StragglerDetector = field(init=False)
    _record: BalanceRecord = field(init=False)
    _confirmations: Confirmations = field(default_factory=Confirmations)
    _speeds_before: list[float] = field(default_factory=list)
    _warm_up: int = WARM_UP
    _window: StepWindow | None = None
    """Steps that are too short for an observation yet."""

    def __post_init__(self) -> None:
        self._workers = [WorkerSpeed() for _ in self.owned]
        self._detector = StragglerDetector(self.micro_batches)
        self._record = BalanceRecord(self.micro_batches)

    @property
    def speeds(self) -> list[float]:
        """Micro-batches per second that each worker seems to reach; 0: unknown."""
        return [worker.speed for worker in self._workers]

    def observe(self, window: StepWindow) -> None:
        """Take what all workers measured since the last call; perhaps propose."""
        if self._window is not None:
            window = self._window.followed_by(window)
        self._window, self.straggler = window, None
        if window.seconds < LEAST_SECONDS:
            return
        self._window = None
        self._warm_up -= 1
        if self._warm_up >= 0:
            return
        for rank, (first, end) in enumerate(self.owned):
            self._workers[rank].observe(window, rank, end - first)
        speeds = self.speeds
        if not all(speeds) or float("inf") in speeds:
            return
        self._speeds_before = self._speeds_before or speeds
        self._record.add(window.seconds, self.owned, speeds)
        self.straggler = self._detector.observe(window, speeds)
        if self.is_live and self.proposal is None:
            after = ownership.fastest(self.micro_batches, speeds, self.least_owned)
            change = self._change(after)
            if self._confirmations.confirm(change.gain):
                self.proposal = change

    @property
    def straggler_to_drop(self) -> int | None:
        """The worker to go on without, if one has been too slow for long enough."""
        speeds = self.speeds
        slowest = speeds.index(min(speeds))
        others = speeds[:slowest] + speeds[slowest + 1 :]
        if not others:
            return None
        least = self.drop_stragglers_below * statistics.median(others)
        first, end = self.owned[slowest]
        is_certain = self._workers[slowest].has_full_window or first == end
        return slowest if is_certain and speeds[slowest] < least else None

    def adopt(self, after: list[Share]) -> Change:
        """All workers, between two steps: adopt the ownership that rank 0 proposed."""
        # Rank 0's proposal carries its gain and cause; other workers may have another.
        own, self.proposal = self.proposal, None
        change = own if own and own.after == after else self._change(after)
        self._confirmations = Confirmations()
        for worker, (first, end) in zip(self._workers, after, strict=True):
            if first == end:
                worker.lose_all()
        self.owned, self._speeds_before = after, change.speeds
        return change

    def summary(self) -> JsonObject:
        """Return what balancing gained, and whether more micro-batches would help."""
        return self._record.summary(self.speeds)

    def _change(self, after: list[Share]) -> Change:
        """Return the change to another ownership, with its gain at the speeds now."""
        speeds = self.speeds
        now = ownership.makespan(self.owned, speeds)
        gain = 1 - ownership.makespan(after, speeds) / now
        slowest = self._workers[speeds.index(min(speeds))]
        cause = "data" if slowest.data_share > 0.5 else "compute"
        return Change(self.owned, after, self._speeds_before, speeds, gain, cause)


def random_ownership(
    micro_batches: int, workers: int, step: int, least_owned: int = 0
) -> list[Share]:
    """Draw an ownership from the step alone, for `--balance random`."""
    chance = random.Random(step)  # noqa: S311  not a secret
    free = micro_batches - workers * least_owned
    cuts = sorted(chance.randint(0, free) for _ in range(workers - 1))
    drawn = ownership.lengths(list(pairwise([0, *cuts, free])))
    return ownership.contiguous([least_owned + number for number in drawn])
