"""Which faults `samestep chaos` injects: a pure function of the seed."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.state import checkpoint


KINDS = ("kill", "stop", "exception", "crash", "corrupt", "diskfull")
"""`crash` kills the supervisor and all workers at once; `corrupt` also damages the
newest checkpoint."""
KILL_POINTS = (
    *("forward", "exchange", "update", "snapshot", "restart"),
    *("any time", "checkpoint", "resume"),
)
"""Where kills happen; the last two kill the supervisor and all workers at once."""
WORKER_POINTS = ("forward", "exchange", "update", "snapshot")


@dataclass
class Injection:
    """One planned fault, and what became of it."""

    number: int
    kind: str
    point: str
    step: int
    rank: int
    at: float | None = None
    """time.monotonic() of the injection; None: not yet."""
    reached: int = 0
    """The last step that was logged before a fault from outside."""
    detected: float | None = None
    """Seconds from the injection until it was noticed."""
    redone: int | None = None
    """Optimizer steps taken again."""
    downtime: float | None = None
    """Seconds from the injection until the workers computed again."""

    def to_fault(self, workers: int) -> dict[str, Any]:
        """The fields of a `faults.Fault` for so many workers."""
        return {
            "number": self.number,
            "kind": self.kind,
            "point": "start" if self.point == "restart" else self.point,
            "step": self.step,
            "rank": self.rank % workers,
        }

    @property
    def hits_one_worker(self) -> bool:
        """Or else the supervisor, the whole run, or the disk."""
        return self.is_inside or self.point == "any time"

    @property
    def is_inside(self) -> bool:
        """Whether a worker does it to itself, at an exact point."""
        return self.point in WORKER_POINTS or self.point == "restart"


def plan(
    seed: int, kills: int, kinds: list[str], steps: int, workers: int
) -> list[Injection]:
    """A pure function: the faults of one training of `steps` steps, in order.

    There are `kills` of kind `kill`, or of the first kind if that is not among them;
    of every other kind there is one for every five of these, and at least one.
    """
    chance = random.Random(seed)  # noqa: S311  a schedule, not a secret
    chosen: list[tuple[str, str]] = []
    points = list(KILL_POINTS)
    chance.shuffle(points)
    main = "kill" if "kill" in kinds else kinds[0]
    for kind in kinds:
        for index in range(kills if kind == main else max(1, kills // 5)):
            if kind == "kill":
                point = points[index % len(points)]
            elif kind in ("stop", "exception"):
                point = chance.choice(WORKER_POINTS)
            else:
                point = kind
            chosen.append((kind, point))
    chance.shuffle(chosen)
    # A worker can only be hit in a restart if there is one: something else comes last.
    chosen.sort(key=lambda fault: fault[1] == "restart", reverse=True)
    if all(point == "restart" for _, point in chosen):
        chosen = [(kind, "forward") for kind, _ in chosen]
    count = len(chosen)
    return [
        Injection(
            number=index + 1,
            kind=kind,
            point=point,
            step=1
            if point == "restart"
            else 1
            + int((0.1 + 0.85 * (index + chance.random()) / count) * (steps - 1)),
            rank=chance.randrange(workers),
        )
        for index, (kind, point) in enumerate(chosen)
    ]


def flip_a_byte(checkpoints: Path, chance: random.Random) -> Path:
    """In a file of the newest checkpoint."""
    newest = checkpoint.path_of(checkpoints, checkpoint.steps(checkpoints)[-1])
    path = newest / chance.choice(
        (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.MANIFEST)
    )
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path
