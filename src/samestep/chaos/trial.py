"""One training under a schedule of faults, started by the command line as users do.

A worker inflicts the faults at exact points on itself. The others come from outside:
real signals, and bits flipped in real files.
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

import psutil

from samestep.chaos.plan import Injection, flip_a_bit
from samestep.errors import TrainingError
from samestep.state import checkpoint
from samestep.system import fault_injection
from samestep.system.json_values import JsonObject


HANG_SECONDS = 1.0
DISK_FULL_SECONDS = 0.6
POLL_SECONDS = 0.01
DEADLINE = 300.0
"""Seconds that a disturbed training may take beyond what is expected."""

Event = JsonObject


@dataclass
class Trial:
    """One disturbed training: `train`, and `resume` after each kill of the run."""

    recipe: Path
    out: Path
    injections: list[Injection]
    workers: int
    most_workers: int
    rng: random.Random
    leftovers: int = 0
    """Processes that outlived a kill of their supervisor."""
    _commands: Iterator[tuple[int, list[str]]] = field(init=False)
    _children: list[psutil.Process] = field(default_factory=list)
    _next_look: float = 0.0

    def __post_init__(self) -> None:
        self._commands = self._all_commands()

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.out / "run"

    def run(self) -> None:
        """Train to the end. Raises TrainingError if the training fails for good."""
        end = time.monotonic() + DEADLINE + 10 * len(self.injections)
        while (code := self._run_once(end)) != 0:
            if code != -signal.SIGKILL:
                raise TrainingError(
                    f"The disturbed training failed with code {code}; "
                    f"see {self.out}/output.log."
                )
        self._assess()

    def _run_once(self, end: float) -> int:
        """Run the next command under the faults that are left; return its exit code."""
        outside = [i for i in self.injections if not i.is_inside and i.at is None]
        process = self._spawn()
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise TrainingError(f"{self.directory} did not end in time.")
                self._look_for_children(process, every=0.25)
                if outside and self._is_due(outside[0]):
                    self._inject(outside[0], process)
                    outside = [i for i in outside if i.at is None]
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
            self._await_children()
        return process.returncode

    def take_missed(self) -> list[Injection]:
        """Remove and return the faults for which the training was too short.

        They get earlier steps, for another training. Raises TrainingError if none of
        the faults happened.
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
            if injection.point == "restart":  # no restart came late enough
                injection.point = "forward"
        return missed

    def _all_commands(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the number of workers and the command line of each start."""
        options = ["--hang-timeout", str(HANG_SECONDS), "--checkpoint-seconds", "0.7"]
        options += ["--max-restarts", str(len(self.injections) + 3)]
        first = ["train", str(self.recipe), "--out", str(self.directory)]
        yield self.workers, [*first, "--workers", str(self.workers), *options]
        for exchange in itertools.cycle(["gloo", "shared"]):
            workers = self.rng.randint(1, self.most_workers)
            placement = ["--workers", str(workers), "--exchange", exchange]
            yield workers, ["resume", str(self.directory), *placement, *options]

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Start the next command, with the faults that have not happened yet."""
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

    def _look_for_children(
        self, process: subprocess.Popen[bytes], every: float = 0.0
    ) -> None:
        """Note the processes of the training, at most once in `every` seconds.

        It takes 10 ms, since psutil reads the parent of every process there is.
        """
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + every
            with contextlib.suppress(psutil.NoSuchProcess):
                self._children = psutil.Process(process.pid).children(recursive=True)

    def _note_faults(self) -> None:
        """Note when the workers' own faults happened."""
        by_number = {injection.number: injection for injection in self.injections}
        for event in _events(self.directory):
            if event["event"] == "fault":
                by_number[event["number"]].at = event["at"]

    def _is_due(self, injection: Injection) -> bool:
        if injection.kind == "corrupt" and not checkpoint.steps(self._checkpoints):
            return False
        if injection.point == "checkpoint":
            being_written = any(self._checkpoints.glob(".step-*.tmp"))
            return being_written and last_step(self.directory) >= injection.step
        return last_step(self.directory) >= injection.step

    @property
    def _checkpoints(self) -> Path:
        return checkpoint.directory_of(self.directory)

    def _inject(self, injection: Injection, process: subprocess.Popen[bytes]) -> None:
        if injection.point != "checkpoint":
            time.sleep(0.03 * self.rng.random())
        self._next_look = 0.0
        self._look_for_children(process)
        injection.reached = last_step(self.directory)
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
        self._await_children()
        if injection.kind == "corrupt":
            flip_a_bit(self._checkpoints, self.rng)
        if injection.point == "resume":
            again = self._spawn()
            time.sleep(2.5 * self.rng.random())
            again.kill()
            again.wait()

    def _kill_worker(self, injection: Injection) -> None:
        started = [
            e for e in _events(self.directory) if e["event"] == "workers started"
        ]
        pids = started[-1]["pids"]
        pid = pids[injection.rank % len(pids)]
        for process in self._children:
            if process.pid == pid and process.is_running():
                injection.at = time.monotonic()
                process.kill()

    def _await_children(self) -> None:
        _, alive = psutil.wait_procs(self._children, timeout=10)
        self.leftovers += len(alive)

    def _assess(self) -> None:
        """Find the consequences of each fault in the events of the run."""
        self._note_faults()
        events = _events(self.directory)
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
    """Return the run's events, each with its time.monotonic() as `at`."""
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
    """Return the last step in metrics.jsonl; 0 if there is none."""
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
