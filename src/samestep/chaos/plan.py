"""Which faults `samestep chaos` injects: a pure function of the seed."""

import random
from dataclasses import dataclass
from pathlib import Path

from samestep.state import checkpoint


KINDS = ("kill", "stop", "exception", "crash", "corrupt", "diskfull")
"""`crash` kills the supervisor and all workers at once; `corrupt` also damages the
newest checkpoint."""
WORKER_POINTS = ("forward", "exchange", "update", "snapshot")
KILL_POINTS = (*WORKER_POINTS, "restart", "any time", "checkpoint", "resume")
"""Where kills happen; the last two kill the supervisor and all workers at once."""


@dataclass
class Injection:
    """One planned fault and its consequences."""

    number: int
    kind: str
    point: str
    step: int
    rank: int
    at: float | None = None
    """time.monotonic() of the injection; None: not yet."""
    reached: int = 0
    """The last step in metrics.jsonl before a fault from outside."""
    detected: float | None = None
    """Seconds from the injection until it was noticed."""
    redone: int | None = None
    """Optimizer steps taken again."""
    downtime: float | None = None
    """Seconds from the injection until the workers computed again."""

    def to_fault(self, workers: int) -> dict[str, str | int]:
        """Return the fields of a `fault_injection.Fault`; ranks wrap at `workers`."""
        return {
            "number": self.number,
            "kind": self.kind,
            "point": "start" if self.point == "restart" else self.point,
            "step": self.step,
            "rank": self.rank % workers,
        }

    @property
    def hits_one_worker(self) -> bool:
        """Whether it hits one worker, not the supervisor, the whole run or the disk."""
        return self.is_inside or self.point == "any time"

    @property
    def is_inside(self) -> bool:
        """Whether the worker inflicts it on itself, at an exact point."""
        return self.point in WORKER_POINTS or self.point == "restart"


def plan(
    seed: int, kills: int, kinds: list[str], steps: int, workers: int
) -> list[Injection]:
    """Return the faults of one training of `steps` steps, in order; a pure function.

    There are `kills` faults of kind `kill`, or of the first kind if `kill` is not among
    them, and of every other kind one for every five of these, but at least one.
    """
    rng = random.Random(seed)  # noqa: S311  a schedule, not a secret
    chosen: list[tuple[str, str]] = []
    points = list(KILL_POINTS)
    rng.shuffle(points)
    main = "kill" if "kill" in kinds else kinds[0]
    for kind in kinds:
        for index in range(kills if kind == main else max(1, kills // 5)):
            if kind == "kill":
                point = points[index % len(points)]
            elif kind in ("stop", "exception"):
                point = rng.choice(WORKER_POINTS)
            else:
                point = kind
            chosen.append((kind, point))
    rng.shuffle(chosen)
    # A fault at `restart` needs a later fault that causes a restart, so these come
    # first; a plan of nothing else would never start.
    chosen.sort(key=lambda fault: fault[1] == "restart", reverse=True)
    if all(point == "restart" for _, point in chosen):
        chosen = [(kind, "forward") for kind, _ in chosen]
    injections = []
    for index, (kind, point) in enumerate(chosen):
        step = 1
        if point != "restart":
            # Spread over the training, without its first 10% and last 5%.
            position = 0.1 + 0.85 * (index + rng.random()) / len(chosen)
            step += int(position * (steps - 1))
        rank = rng.randrange(workers)
        injections.append(Injection(index + 1, kind, point, step, rank))
    return injections


def flip_a_bit(checkpoints: Path, rng: random.Random) -> Path:
    """Flip one bit in a file of the newest checkpoint; return the file's path."""
    newest = checkpoint.path_of(checkpoints, checkpoint.steps(checkpoints)[-1])
    path = newest / rng.choice(
        (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.MANIFEST)
    )
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path
