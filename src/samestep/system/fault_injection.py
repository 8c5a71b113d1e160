"""Injected faults, for `samestep chaos` and the tests.

The workers' faults are listed in the file that SAMESTEP_FAULTS names; without it
nothing is injected. Each fault happens once: the worker reports it first, and the
supervisor leaves it out when it starts the next workers. Writes of the supervisor fail
as on a full disk while the file exists that SAMESTEP_DISK_FULL names.
"""

import errno
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal


SCHEDULE, DISK_FULL = "SAMESTEP_FAULTS", "SAMESTEP_DISK_FULL"


@dataclass(frozen=True)
class Fault:
    """A fault of one worker, the first time that it is at `point` from `step` on."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "strict": True}

    number: int
    kind: Literal["kill", "stop", "exception", "loop", "flip"]
    """`flip` inverts a bit of the worker's gradients, in this step only."""
    point: Literal["start", "forward", "exchange", "update", "snapshot"]
    """While a worker starts, before a forward pass, before its gradients are summed,
    between that and the update, in the middle of saving a snapshot."""
    step: int
    rank: int


class InjectedError(Exception):
    """A fault of kind `exception`."""


def from_environment() -> list[Fault]:
    """Return the faults in the file that SAMESTEP_FAULTS names."""
    path = os.environ.get(SCHEDULE)
    if not path:
        return []
    # Here, since it takes 0.1 s to import, and the command line's help needs no faults.
    from pydantic import TypeAdapter

    return TypeAdapter(list[Fault]).validate_json(Path(path).read_bytes())


def check_disk() -> None:
    """Raise the OSError of a full disk, if the disk is to be full."""
    flag = os.environ.get(DISK_FULL)
    if flag and os.path.exists(flag):  # noqa: PTH110  ten times as fast as Path
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """One worker's faults."""

    def __init__(
        self,
        rank: int,
        faults: Sequence[Fault],
        report: Callable[[Fault], None] = lambda _: None,
    ) -> None:
        """Keep the faults of this rank.

        `report` is called with each fault before it happens, with the step at which it
        does, and tells the supervisor.
        """
        self._mine = [f for f in faults if f.rank == rank and f.kind != "flip"]
        self._flips = [fault for fault in faults if fault.kind == "flip"]
        self._rank, self._report = rank, report

    def at(self, point: str, step: int) -> None:
        """Inject the fault that is due at this point, if any; it may not return."""
        for fault in self._mine:
            if fault.point == point and fault.step <= step:
                self._mine.remove(fault)
                self._inject(fault, step)
                return

    def flips(self, step: int) -> bool:
        """Return whether a bit of any worker is to be inverted in this step."""
        return any(fault.step == step for fault in self._flips)

    def take_flip(self, step: int) -> bool:
        """Return whether it is one of this worker's, which is reported.

        A step that is to be repeated with such a fault has several.
        """
        mine = [f for f in self._flips if (f.step, f.rank) == (step, self._rank)]
        for fault in mine[:1]:
            self._report(fault)
        return bool(mine)

    def _inject(self, fault: Fault, step: int) -> None:
        self._report(replace(fault, step=step))
        if fault.kind == "exception":
            raise InjectedError(f"on purpose, at {fault.point}")
        while fault.kind == "loop":
            pass
        number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
        os.kill(os.getpid(), number)
