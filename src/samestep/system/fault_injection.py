"""Faults on purpose: what `samestep chaos` and the tests let happen.

A schedule for the workers comes from the file that SAMESTEP_FAULTS names; without it
nothing is ever injected. Each of its faults happens once: the worker first tells the
supervisor, which leaves it out when it starts the next workers. The disk of the
supervisor is full as long as the file exists that SAMESTEP_DISK_FULL names.
"""

import errno
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


POINTS = ("start", "forward", "exchange", "update", "snapshot")
"""Where: while a worker starts, before a forward pass, before its gradients are
summed, between that and the update, in the middle of saving a snapshot."""

SCHEDULE, DISK_FULL = "SAMESTEP_FAULTS", "SAMESTEP_DISK_FULL"


class Fault(BaseModel):
    """One worker is hit at one point at the first chance from `step` on."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int
    kind: Literal["kill", "stop", "exception", "loop"]
    point: Literal["start", "forward", "exchange", "update", "snapshot"]
    step: int
    rank: int


class InjectedError(Exception):
    """A fault of kind `exception`."""


def from_environment() -> list[Fault]:
    """What the supervisor hands to its workers."""
    path = os.environ.get(SCHEDULE)
    if not path:
        return []
    return [Fault.model_validate(f) for f in json.loads(Path(path).read_text())]


def check_disk() -> None:
    """Raises the OSError of a full disk, if the disk is to be full."""
    flag = os.environ.get(DISK_FULL)
    if flag and os.path.exists(flag):  # noqa: PTH110  ten times as fast as Path
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """One worker's faults."""

    def __init__(
        self,
        rank: int,
        schedule: Sequence[Mapping[str, Any]],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """`schedule` holds the fields of `Fault`; `report` reaches the supervisor."""
        faults = [Fault.model_validate(fields) for fields in schedule]
        self._mine = [fault for fault in faults if fault.rank == rank]
        self._report = report

    def at(self, point: str, step: int) -> None:
        """The worker is at this point now; it may not return."""
        for fault in self._mine:
            if fault.point == point and fault.step <= step:
                self._mine.remove(fault)
                self._inject(fault, step)
                return

    def _inject(self, fault: Fault, step: int) -> None:
        self._report({"type": "fault", **fault.model_dump(), "step": step})
        if fault.kind == "exception":
            raise InjectedError(f"on purpose, at {fault.point}")
        while fault.kind == "loop":
            pass
        number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
        os.kill(os.getpid(), number)
