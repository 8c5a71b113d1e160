"""One training under a schedule of faults, as processes of its own, as users start it.

Faults at exact points a worker does to itself; the others come from outside: real
signals, real bytes flipped in real files.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from samestep.chaos.plan import Injection, flip_a_byte
from samestep.errors import TrainingError
from samestep.state import checkpoint
from samestep.system import fault_injection


HANG_SECONDS = 1.0
DISK_FULL_SECONDS = 0.6
POLL_SECONDS = 0.01
DEADLINE = 300.0
"""Seconds that a disturbed training may take beyond what is expected."""

Event = dict[str, Any]


@dataclass
class Trial:
    """One disturbed training: `train`, then `resume` as often as it is killed whole."""

    recipe: Path
    out: Path
    injections: list[Injection]
    workers: int
    most_workers: int
    chance: random.Random
    leftovers: int = 0
    """Processes that outlived a kill of their supervisor."""
    _commands: Iterator[tuple[int, list[str]]] = field(init=False)
    _family: list[psutil.Process] = field(default_factory=list)
    _next_look: float = 0.0

    def __post_init__(self) -> None:
        self._commands = self._all_commands()

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.out / "run"

    def undergo(self) -> None:
        """Raises TrainingError if the training fails for good."""
        end = time.monotonic() + DEADLINE + 10 * len(self.injections)
        outside = [i for i in self.injections if not i.is_inside]
        while True:
            process = self._spawn()
            try:
                while process.poll() is None:
                    if time.monotonic() > end:
                        raise TrainingError(f"{self.run} did not end in time.")
                    self._observe(process, every=0.25)
                    if outside and self._is_due(outside[0]):
                        self._inject(outside[0], process)
                        outside = [i for i in outside if i.at is None]
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
                self._await_family()
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                raise TrainingError(
                    f"The disturbed training failed with code {process.returncode}; "
                    f"see {self.out}/output.log."
                )
        self._assess()

    def take_missed(self) -> list[Injection]:
        """Removes and returns the faults for which the training was too short.

        Another training meets them, earlier. Raises TrainingError if it met none.
        """
        missed = [i for i in self.injections if i.at is None]
        if missed and len(missed) == len(self.injections):
            raise TrainingError(
                f"The training ended before any of {len(missed)} faults could happen. "
                "Choose a recipe that takes longer."
            )
        self.injections = [i for i in self.injections if i.at is not None]
        for injection in missed:
            injection.step = max(1, injection.step // 2)
            if injection.point == "restart":  # there was none late enough
                injection.point = "forward"
        return missed

    def _all_commands(self) -> Iterator[tuple[int, list[str]]]:
        """With the number of workers of each."""
        options = ["--hang-timeout", str(HANG_SECONDS), "--checkpoint-seconds", "0.7"]
        options += ["--max-restarts", str(len(self.injections) + 3)]
        first = ["train", str(self.recipe), "--out", str(self.run)]
        yield self.workers, [*first, "--workers", str(self.workers), *options]
        for exchange in itertools.cycle(["gloo", "shared"]):
            workers = self.chance.randint(1, self.most_workers)
            where = ["--workers", str(workers), "--exchange", exchange]
            yield workers, ["resume", str(self.run), *where, *options]

    def _spawn(self) -> subprocess.Popen[bytes]:
        """The next command, with the faults that have not happened yet."""
        workers, command = next(self._commands)
        self._note_faults()
        pending = [i for i in self.injections if i.is_inside and i.at is None]
        schedule = self.out / "faults.json"
        schedule.write_text(json.dumps([i.to_fault(workers) for i in pending]))
        env = os.environ | {
            fault_injection.SCHEDULE: str(schedule),
            fault_injection.DISK_FULL: str(self.out / "disk-full"),
        }
        with (self.out / "output.log").open("ab") as output:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "samestep", *command],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _observe(self, process: subprocess.Popen[bytes], every: float = 0.0) -> None:
        """Which processes belong to the training; a look at all costs 10 ms."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + every
            with contextlib.suppress(psutil.NoSuchProcess):
                self._family = psutil.Process(process.pid).children(recursive=True)

    def _note_faults(self) -> None:
        """When the workers met theirs."""
        by_number = {injection.number: injection for injection in self.injections}
        for event in _events(self.run):
            if event["event"] == "fault":
                by_number[event["number"]].at = event["at"]

    def _is_due(self, injection: Injection) -> bool:
        if injection.kind == "corrupt" and not checkpoint.steps(self._checkpoints):
            return False
        if injection.point == "checkpoint":
            being_written = any(self._checkpoints.glob(".step-*.tmp"))
            return being_written and last_step(self.run) >= injection.step
        return last_step(self.run) >= injection.step

    @property
    def _checkpoints(self) -> Path:
        return checkpoint.directory_of(self.run)

    def _inject(self, injection: Injection, process: subprocess.Popen[bytes]) -> None:
        if injection.point != "checkpoint":
            time.sleep(0.03 * self.chance.random())
        self._next_look = 0.0
        self._observe(process)
        injection.reached = last_step(self.run)
        if injection.point == "any time":
            self._kill_worker(injection)
            return
        injection.at = time.monotonic()
        if injection.kind == "diskfull":
            flag = self.out / "disk-full"
            flag.touch()
            time.sleep(DISK_FULL_SECONDS)
            flag.unlink()
            return
        process.kill()
        process.wait()
        self._await_family()
        if injection.kind == "corrupt":
            flip_a_byte(self._checkpoints, self.chance)
        if injection.point == "resume":
            again = self._spawn()
            time.sleep(2.5 * self.chance.random())
            again.kill()
            again.wait()

    def _kill_worker(self, injection: Injection) -> None:
        started = [e for e in _events(self.run) if e["event"] == "workers started"]
        pids = started[-1]["pids"]
        pid = pids[injection.rank % len(pids)]
        for process in self._family:
            if process.pid == pid and process.is_running():
                injection.at = time.monotonic()
                process.kill()

    def _await_family(self) -> None:
        _, alive = psutil.wait_procs(self._family, timeout=10)
        self.leftovers += len(alive)

    def _assess(self) -> None:
        """Matches each fault with what the events tell of its consequences."""
        self._note_faults()
        events = _events(self.run)
        for injection in self.injections:
            if injection.at is None:
                continue
            later = [e for e in events if e["at"] >= injection.at]
            if injection.kind == "diskfull":
                noticed = _first(later, "checkpoint failed")
                injection.downtime, injection.redone = 0.0, 0
            else:
                noticed = _first(later, "failed", "resumed")
                again = _first(later, "training")
                if again is not None:
                    injection.downtime = again["at"] - injection.at
                    reached = (noticed or {}).get("step") or injection.reached
                    injection.redone = max(0, reached - again["step"])
            if noticed is not None:
                injection.detected = noticed["at"] - injection.at


def _events(run: Path) -> list[Event]:
    """With `at`, the time on this machine's monotonic clock."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return []
    events, base = [], 0.0
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        base = event.get("monotonic", base)
        events.append(event | {"at": base + event["seconds"]})
    return events


def _first(events: list[Event], *names: str) -> Event | None:
    return next((event for event in events if event["event"] in names), None)


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0
