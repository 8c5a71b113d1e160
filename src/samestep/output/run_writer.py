"""Writes the run directory during a training.

Only the supervisor writes; under torchrun the first worker of a machine; in a loop of
the user's own, rank 0. A disk that is full, read-only or failing does not end a
training: lines wait in memory until they can be written, after a warning.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import tomli_w

from samestep.errors import OutputError, RunError, SamestepError
from samestep.files import atomic, lock, untrusted
from samestep.messages.training import (
    EpochRecord,
    EvaluationRecord,
    Message,
    Restarted,
    SnapshotSaved,
    Span,
    StepRecord,
    Traced,
    WorkersStarted,
    WrongWorker,
)
from samestep.messages.wire import as_record
from samestep.output import events, ledger, trace
from samestep.output.events import EVENTS
from samestep.output.fence import FILE, TAKEN, Fence
from samestep.output.json_lines import JsonLines, whole_lines
from samestep.output.ledger import LedgerFile
from samestep.output.logs import take_log
from samestep.output.run import MODEL_FILE, RECIPE_FILE, RunResult, Settings
from samestep.system import machine
from samestep.system.json_values import JsonObject


LOCK_FILE = ".lock"
RECORDS = {
    RECIPE_FILE,
    "environment.json",
    "metrics.jsonl",
    "events.jsonl",
    ledger.FILE,
    ledger.MICRO_BATCHES,
    "result.json",
    "logs",
    "tensorboard",
    LOCK_FILE,
    FILE,
    f"{TAKEN}1",
}
"""The files of a training that ended before its first step."""
PATIENCE_SECONDS = 15.0
"""At the end of a training, writing the weights is tried for so long."""


def _ignore(_: object) -> None:
    """Do nothing."""


@dataclass
class RunWriter(AbstractContextManager["RunWriter"]):
    """One run directory, locked against other writers until the context ends."""

    path: Path
    settings: Settings
    started: float
    """time.monotonic() when the command began."""
    warn: Callable[[str], None] = _ignore
    """Shows a warning about the disk."""
    on_record: Callable[[Mapping[str, Any]], None] = _ignore
    """Gets the records of metrics.jsonl, and one more before and after them."""
    step: int = 0
    """Optimizer steps taken before the command began."""
    epochs: list[JsonObject] = field(default_factory=list)
    evaluations: list[JsonObject] = field(default_factory=list)
    is_new: bool = False
    """Whether the command made the directory."""
    restarts: int = 0
    wrong_workers: list[JsonObject] = field(default_factory=list)
    standstill: float = 0.0
    """Seconds in which rank 0 saved snapshots instead of training."""
    _traces: dict[int, list[Span]] = field(default_factory=dict)
    _facts: JsonObject = field(default_factory=dict)
    """The baselines of the test split and the number of skipped samples, if known."""
    _lock: int = -1

    @classmethod
    def create(cls, settings: Settings, started: float) -> Self:
        """Make a new directory. Raises RunError if it exists or cannot be made."""
        out = settings.placement["out"]
        path = new_directory(Path(out) if out else None, settings.recipe["name"])
        return cls(path, settings, started, is_new=True)._begin()

    @classmethod
    def reopen(
        cls,
        path: Path,
        settings: Settings,
        started: float,
        generation: tuple[int | None, str] = (None, ""),
        patience: float = 0.0,
    ) -> Self:
        """Open a run to continue it. Raises RunError if another process writes it.

        `generation` is the number and the writer's name for the fence. Waits up to
        `patience` seconds for a process that writes the run now.
        """
        writer = cls(path, settings, started)
        return writer._begin(*generation, patience)

    def _begin(
        self, number: int | None = None, writer: str = "", patience: float = 0.0
    ) -> Self:
        untrusted.check_parts(self.path)
        try:
            self._lock = _lock(self.path, patience)
            self.logs.mkdir(exist_ok=True)
            self.fence = Fence.claim(self.path, number, writer)
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}. Make it writable "
                "first."
            ) from None

        def warn(text: str) -> None:
            self.warn(text)  # which the session sets later

        self._metrics, self._events = (
            JsonLines(self.path / name, self.fence, warn)
            for name in ("metrics.jsonl", "events.jsonl")
        )
        micro_batches = self.settings.recipe["micro_batches"]
        self._ledger, self._micro_batches = (
            LedgerFile(self.path / name, self.fence, warn, columns=columns)
            for name, columns in ledger.columns(micro_batches).items()
        )
        return self

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        """Unlock the run.

        A new directory is removed if the training ended before its first step, so that
        its name can be used again once the mistake is corrected.
        """
        if error is not None and self._is_void(error):
            if isinstance(error, SamestepError):
                take_log(error)
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _is_void(self, error: BaseException) -> bool:
        """Return whether a new run has ended in its first step or before."""
        has_begun = getattr(error, "details", {}).get("step") or self._metrics.any()
        names = {path.name for path in self.path.iterdir()}
        return self.is_new and not has_begun and names <= RECORDS

    def start(self, name: str, data: Mapping[str, Any], device: str = "cpu") -> None:
        """Write what is known before the first step. Raises OutputError."""
        settings = self.settings
        self._write(settings.file, tomli_w.dumps(settings.recipe).encode())
        self._facts = {k: data[k] for k in ("baselines", "skipped") if k in data}
        environment = machine.describe() | {"device": device, "data": data}
        text = json.dumps(environment, indent=2) + "\n"
        self._write("environment.json", text.encode())
        (self.path / "metrics.jsonl").touch()
        if self.is_new:
            self._begin_ledgers(0)
        (self.path / "result.json").unlink(missing_ok=True)
        self.event(
            name,
            pid=os.getpid(),
            workers=settings.placement["workers"],
            exchange=settings.placement["exchange"],
            monotonic=self.started,
        )
        began = {"type": "started", "run": str(self.path), "step": self.step}
        self.on_record(began | settings.fields)

    def rewind(
        self,
        step: int,
        epochs: list[JsonObject],
        received: tuple[str, Mapping[str, bytes]] | None = None,
    ) -> None:
        """Drop the metrics of steps that will be repeated. Raises OutputError.

        `received` are the lines and ledgers of a machine that has the newer state.
        """
        lines = whole_lines(self.path / "metrics.jsonl")
        if received is not None:
            lines = received[0].splitlines(keepends=True)
            for name in ledger.FILES:
                self._write(name, received[1].get(name, b""))
        self._go_on(step, [line for line in lines if _is_kept(line, step, epochs)])
        self.epochs = epochs
        self._begin_ledgers(step)

    def rewind_to(self, step: int, records: int) -> list[JsonObject]:
        """Keep the first lines of metrics.jsonl; return them. Raises OutputError."""
        lines = whole_lines(self.path / "metrics.jsonl")[:records]
        return self._go_on(step, [line for line in lines if _is_kept(line)])

    def _go_on(self, step: int, kept: list[str]) -> list[JsonObject]:
        """Go on after these lines of metrics.jsonl; return their records."""
        self.step = step
        self._write("metrics.jsonl", "".join(kept).encode())
        happened = whole_lines(self.path / "events.jsonl")
        self._write("events.jsonl", "".join(happened).encode())
        self.wrong_workers = events.wrong_workers(events.read(happened))
        records = [untrusted.parse_json(line) for line in kept]
        self.epochs, self.evaluations = (
            [
                {name: record[name] for name in record if name not in ("type", "at")}
                for record in records
                if record["type"] == kind
            ]
            for kind in ("epoch", "evaluation")
        )
        return records

    def _begin_ledgers(self, step: int) -> None:
        has_micro_batches = self.settings.placement.get("ledger") == "micro-batches"
        for each in (self._ledger, self._micro_batches)[: 1 + has_micro_batches]:
            content = each.begin(self.settings.digest, step)
            if content is not None:
                self._write(each.path.name, content)
        if not has_micro_batches:  # of steps that the run does not have
            self._micro_batches.path.unlink(missing_ok=True)

    @property
    def logs(self) -> Path:
        """The directory of the workers' logs."""
        return self.path / "logs"

    def event(self, name: str, **fields: Any) -> None:
        """Append to events.jsonl, with the seconds since the command began."""
        seconds = time.monotonic() - self.started
        self._events.append({"seconds": seconds, "event": name, **fields})

    def receive(self, message: Message) -> None:
        """Write what a message of a worker or of the supervisor adds to the run."""
        match message:
            case StepRecord(step=step):
                self.add("step", as_record(message))
                self._ledger.add(step, message.hashes)
                self._micro_batches.add(step, message.micro_batch_hashes)
            case EpochRecord():
                self.add("epoch", as_record(message))
            case EvaluationRecord():
                self.add("evaluation", as_record(message))
            case Restarted():
                self.restarts += 1
            case WrongWorker():
                self.wrong_workers.append(as_record(message))
            case SnapshotSaved(seconds=seconds):
                self.standstill += seconds
            case WorkersStarted():
                self._traces = {}
            case Traced(worker=worker, spans=spans):
                self._add_trace(worker, spans)
        if type(message) in EVENTS:
            fields = as_record(message)
            fields.pop("layout", None)  # long, and in the manifest of every checkpoint
            self.event(EVENTS[type(message)], **fields)

    def add(self, kind: str, record: JsonObject) -> None:
        """Append to metrics.jsonl a record of a `step`, `epoch` or `evaluation`."""
        at = time.monotonic() - self.started
        line = {"type": kind, **record, "at": at}
        self._metrics.append(line)
        self.on_record(line)
        if kind == "epoch":
            self.epochs.append(record)
            sha256 = record["weights_sha256"]
            self.event("epoch", epoch=record["epoch"], sha256=sha256)
        elif kind == "evaluation":
            self.evaluations.append(record)

    def _add_trace(self, worker: int, spans: list[Span]) -> None:
        """Write the trace of all workers so far: the parts of some may never come."""
        self._traces[worker] = spans
        try:
            self._write(trace.FILE, json.dumps(trace.chrome(self._traces)).encode())
        except OutputError as error:
            self.warn(str(error))

    def write_model(self, content: bytes) -> None:
        """Write the final weights, as soon as the disk works. Raises OutputError."""
        end = time.monotonic() + PATIENCE_SECONDS
        warn = self.warn
        while True:
            try:
                return self._write(MODEL_FILE, content)
            except OutputError as error:
                if time.monotonic() > end:
                    raise
                warn(f"{error} It will keep trying for {PATIENCE_SECONDS:.0f} s.")
                warn = _ignore  # only the first time
                time.sleep(0.2)

    def close(self, status: str, **fields: Any) -> RunResult:
        """Write result.json, atomically and last. Raises OutputError."""
        self.event(status)
        result = {
            **self.settings.fields,
            "status": status,
            **fields,
            "train_seconds": sum(epoch["seconds"] for epoch in self.epochs),
            "wall_seconds": time.monotonic() - self.started,
            "restarts": self.restarts,
            "wrong_workers": self.wrong_workers,
            "snapshot_seconds": self.standstill,
            "ledger_sha256": self._ledger.sha256,
            "micro_batch_ledger_sha256": self._micro_batches.sha256,
            "noise_scale": self.epochs[-1].get("noise_scale") if self.epochs else None,
            **self._facts,
            "epochs": self.epochs,
        }
        if self.evaluations:
            result["evaluations"] = self.evaluations
        text = json.dumps(result, indent=2) + "\n"
        self._write("result.json", text.encode())
        self.on_record({"type": status, **result})
        return RunResult(self.path, result)

    def _write(self, name: str, content: bytes) -> None:
        try:
            self.fence.check()
            atomic.write(self.path / name, content)
        except OSError as error:
            raise OutputError(
                f"{self.path / name} cannot be written: {error.strerror}."
            ) from None


def _is_kept(
    line: str, step: float = math.inf, epochs: Sequence[JsonObject] | None = None
) -> bool:
    """Return whether a line is a record, not of a later step or another epoch."""
    try:
        record = untrusted.parse_json(line)
        if record["type"] == "epoch" and epochs is not None:
            return bool(record["epoch"] <= len(epochs))
        return bool(record["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False


def _lock(path: Path, patience: float) -> int:
    """Lock a run until the returned descriptor is closed.

    Raises RunError if another process writes the run, and OSError.
    """
    fd = lock.acquire(path / LOCK_FILE, patience)
    if fd is None:
        raise RunError(
            f"Only one process may write a run, and another one is training {path}. "
            "Wait for its end, or end it."
        )
    return fd


def new_directory(chosen: Path | None, name: str, option: str = "--out") -> Path:
    """Make a directory: the `chosen` one, or one below runs/.

    Raises RunError, which tells to choose another with the `option`.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    default = Path("runs") / f"{name}-{stamp}"
    # For recipes of one name that start in the same second.
    others = (default.with_name(f"{default.name}-{n}") for n in range(2, 100))
    candidates = [chosen] if chosen else [default, *others]
    for path in candidates:
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise RunError(
                f"The run directory {path} cannot be made: {error.strerror}. "
                f"Choose another with `{option}`."
            ) from None
        return path
    raise RunError(
        f"A run never overwrites anything, and {candidates[0]} exists. "
        f"Choose another directory with `{option}`, or remove this one."
    )
