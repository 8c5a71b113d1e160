"""`samestep chaos`: trains while everything fails, and shows that nothing was lost.

One undisturbed training, then others of the same recipe under a schedule of faults that
only the seed determines. They run as processes of their own, as a user starts them, and
most faults come from outside: real signals, real bytes flipped in real files.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from samestep import checkpoint, faults
from samestep.api import train
from samestep.errors import (
    PlacementError,
    RunError,
    TrainingError,
    did_you_mean,
)
from samestep.injections import KINDS, Injection, flip_a_byte, plan
from samestep.placement import Placement
from samestep.recipe import Recipe
from samestep.run import Run


KILLS_PER_RUN = 10
HANG_SECONDS = 1.0
DISK_FULL_SECONDS = 0.6
POLL_SECONDS = 0.01
DEADLINE = 300.0
"""Seconds that a disturbed training may take beyond what is expected."""

Event = dict[str, Any]


@dataclass
class Ordeal:
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
                        self._inject(outside.pop(0), process)
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
            faults.SCHEDULE: str(schedule),
            faults.DISK_FULL: str(self.out / "disk-full"),
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
        for event in _events(self.run):
            if event["event"] == "fault":
                self.injections[event["number"] - 1].at = event["at"]

    def _is_due(self, injection: Injection) -> bool:
        if injection.kind == "corrupt" and not checkpoint.steps(self._checkpoints):
            return False
        if injection.point == "checkpoint":
            being_written = any(self._checkpoints.glob(".step-*.tmp"))
            return being_written and _last_step(self.run) >= injection.step
        return _last_step(self.run) >= injection.step

    @property
    def _checkpoints(self) -> Path:
        return checkpoint.directory_of(self.run)

    def _inject(self, injection: Injection, process: subprocess.Popen[bytes]) -> None:
        if injection.point != "checkpoint":
            time.sleep(0.03 * self.chance.random())
        self._next_look = 0.0
        self._observe(process)
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
        injection.at = time.monotonic()
        for process in self._family:
            if process.pid == pid and process.is_running():
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
                    reached = (noticed or {}).get("step") or _step_before(
                        events, injection.at
                    )
                    injection.redone = max(0, reached - again["step"])
            if noticed is not None:
                injection.detected = noticed["at"] - injection.at


@dataclass
class Report:
    """The verdict of all ordeals."""

    calm: str
    """The fingerprint of the undisturbed training."""
    ordeals: list[Ordeal]
    fingerprints: list[str]

    @property
    def is_identical(self) -> bool:
        """Whether every fault happened, nothing was left, and no bit differs."""
        return (
            all(fingerprint == self.calm for fingerprint in self.fingerprints)
            and not any(ordeal.leftovers for ordeal in self.ordeals)
            and all(i.at is not None for o in self.ordeals for i in o.injections)
        )

    @property
    def table(self) -> Table:
        """What was injected, and what it cost."""
        return _table(self.ordeals)

    @property
    def summary(self) -> str:
        """The fingerprints and the verdict."""
        injections = [i for ordeal in self.ordeals for i in ordeal.injections]
        happened = sum(injection.at is not None for injection in injections)
        leftovers = sum(ordeal.leftovers for ordeal in self.ordeals)
        lines = [f"undisturbed  sha256 {self.calm}"]
        lines += [f"disturbed    sha256 {found}" for found in self.fingerprints]
        lines.append(
            f"{happened} of {len(injections)} faults injected, {leftovers} processes "
            f"left behind: {'identical' if self.is_identical else 'DIFFERENT'}"
        )
        return "\n".join(lines)


def unleash(
    recipe: Recipe,
    kills: int,
    seed: int,
    kinds: list[str],
    workers: int,
    out: Path | None,
) -> Report:
    """One undisturbed training and one for every ten kills. Raises UsageError."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise PlacementError(
            f"Faults are any of {', '.join(KINDS)}; received `{unknown[0]}`."
            f"{did_you_mean(unknown[0], KINDS)}"
        )
    out = out or Path("runs") / f"chaos-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"The directory {out} cannot be made: {error.strerror}. Choose another "
            "with `--out`."
        ) from None
    recipe_file = out / "recipe.toml"
    recipe_file.write_text(recipe.to_toml())
    calm = train(recipe, Placement(workers=workers, out=out / "undisturbed"))
    total = _last_step(calm.path)
    ordeals, fingerprints = [], []
    for index, start in enumerate(range(0, max(kills, 1), KILLS_PER_RUN)):
        part = min(KILLS_PER_RUN, kills - start)
        ordeal = Ordeal(
            recipe=recipe_file,
            out=out / f"disturbed-{index + 1}",
            injections=plan(seed + index, part, kinds, total, workers),
            workers=workers,
            most_workers=min(recipe.micro_batches, workers + 2),
            chance=random.Random(seed + index),  # noqa: S311  not a secret
        )
        ordeal.out.mkdir()
        ordeal.undergo()
        ordeals.append(ordeal)
        fingerprints.append(Run.open(ordeal.run).weights_sha256)
    return Report(calm.weights_sha256, ordeals, fingerprints)


def _table(ordeals: list[Ordeal]) -> Table:
    """What was injected, and what it cost."""
    shown = Table(box=None, pad_edge=False)
    for name in ("run", "fault", "where", "step", "worker"):
        shown.add_column(name)
    for name in ("detected", "redone", "downtime"):
        shown.add_column(name, justify="right")
    for index, ordeal in enumerate(ordeals, 1):
        for injection in sorted(ordeal.injections, key=lambda i: i.at or 0.0):
            shown.add_row(
                str(index),
                injection.kind,
                injection.point if injection.point != injection.kind else "",
                str(injection.step),
                str(injection.rank) if injection.hits_one_worker else "all",
                _seconds(injection.detected),
                "-" if injection.redone is None else f"{injection.redone} steps",
                _seconds(injection.downtime),
            )
    return shown


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


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


def _last_step(run: Path) -> int:
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


def _step_before(events: list[Event], moment: float) -> int:
    """The last step known to have been taken before a kill of everything."""
    steps = [e["step"] for e in events if e["at"] < moment and "step" in e]
    return max([int(s) for s in steps if s is not None], default=0)
