"""Snapshots in memory, from which a loop goes on when torchrun starts it again.

After a worker has died, torchrun starts all of them again (`--max-restarts`). Its
agent, their parent, lives on. So a snapshot is a file in memory that is named after the
agent, by process id and start time: no other job finds it. One worker of each machine
writes it, in full and beside the last one, then renames it: whenever a worker dies,
there is one complete snapshot.
"""

import atexit
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from weakref import WeakSet

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from samestep.errors import OwnCodeError, PlacementError
from samestep.exchange import Merger
from samestep.files import lock, untrusted
from samestep.loop.process_group import gather


MEMORY = Path("/dev/shm")  # noqa: S108  readers check the owner
PREFIX = "samestep-loop"
PATIENCE_SECONDS = 10.0
"""How long to wait for a lock: loaders of a worker that has died hold it for 5 s."""
NONE, TAKEN = -1, -2
"""Instead of the number of a snapshot: there is none; another loop keeps some."""


class Stateful(Protocol):
    """A part of what a loop needs to go on: a model, an optimizer, a scheduler."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Go on with a state."""


class Snapshots:
    """Those of one loop, and of all it needs."""

    def __init__(self, steps: int, parts: Mapping[str, Stateful]) -> None:
        """All workers: save the parts after every `steps` steps.

        Raises OwnCodeError.
        """
        if steps < 1:
            raise OwnCodeError(
                f"A snapshot is taken after every 1 or more steps; received {steps}."
            )
        self._steps, self._parts = steps, parts
        self._since, self._number = 0, 0
        self._file = file_of_agent()
        if self._file is not None and os.environ["LOCAL_RANK"] != "0":
            self._file = None
        self._is_refused = self._file is not None and not self._open(self._file)

    def _open(self, file: Path) -> bool:
        """Lock the file against other loops; return whether that was possible."""
        remove_stale(file.parent)
        self._lock = lock.acquire(file.with_suffix(".lock"), patience=PATIENCE_SECONDS)
        if self._lock is not None:
            atexit.register(remove_at_end, file)
        return self._lock is not None

    def restore(self, exchange: Merger, rank: int) -> None:
        """All workers: load the newest snapshot, if there is one.

        Raises OwnCodeError, on all of them, if another loop of the script keeps some.
        """
        saved = self._read()
        number = TAKEN if self._is_refused else saved.get("number", NONE)
        numbers = gather(exchange, rank, number)
        if TAKEN in numbers:
            raise OwnCodeError(
                "One loop of a script keeps snapshots, so that all are of the same "
                "step. Call `keep` once, and pass it the other loops: "
                "`keep(50, other=other_loop, ...)`."
            )
        if max(numbers) == NONE:
            return
        if exchange.workers > 1:  # they may be on several machines
            saved = _sent(saved, rank, numbers.index(max(numbers)))
        self._number = saved["number"]
        for name, part in self._parts.items():
            part.load_state_dict(saved["states"][name])

    def _read(self) -> dict[str, Any]:
        if self._is_refused or self._file is None or not self._file.exists():
            return {}
        with os.fdopen(untrusted.open_regular(self._file), "rb") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                raise PlacementError(
                    f"A snapshot belongs to the user who trains; `{self._file}` is "
                    "another's. Remove it."
                )
            return _loaded(file)

    def after_step(self) -> None:
        """All workers, between two steps: save, if it is time to."""
        self._since += 1
        if self._since < self._steps:
            return
        self._since, self._number = 0, self._number + 1
        # The states of loops take all workers.
        states = {name: part.state_dict() for name, part in self._parts.items()}
        if self._file is not None:
            _write(self._file, {"number": self._number, "states": states})
            if self._number == 1:  # not only when it is needed
                self._read()


class Completeness:
    """Refuses snapshots without what the kept networks are trained by."""

    def __init__(self, parts: Sequence[Stateful]) -> None:
        self._parts = parts
        self._found: WeakSet[Optimizer] = WeakSet()
        networks = [part for part in parts if isinstance(part, nn.Module)]
        self._weights = {id(p) for network in networks for p in network.parameters()}
        register_optimizer_step_post_hook(self._check)

    def _check(self, optimizer: Optimizer, *_: Any) -> None:
        """Raise OwnCodeError if an optimizer or its schedule is not kept."""
        if optimizer in self._found:
            return
        groups = optimizer.param_groups
        if not any(id(p) in self._weights for group in groups for p in group["params"]):
            return
        schedules = [part for part in self._parts if isinstance(part, LRScheduler)]
        has_schedule = hasattr(optimizer.step, "_wrapped_by_lr_sched")
        if not any(part is optimizer for part in self._parts):
            missing = "optimizer"
        elif has_schedule and all(s.optimizer is not optimizer for s in schedules):
            missing = "schedule"
        else:
            self._found.add(optimizer)
            return
        raise OwnCodeError(
            "A snapshot holds all that a training goes on with, and this one has no "
            f"{missing} for {type(optimizer).__name__}. Pass it to `keep`: "
            "`keep(50, optimizer=optimizer, scheduler=scheduler)`."
        )


def _write(file: Path, saved: dict[str, Any]) -> None:
    new = file.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(
            os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "wb"
        ) as f:
            torch.save(saved, f)
        new.replace(file)
    except (OSError, RuntimeError) as error:  # torch's, if the memory is full
        new.unlink(missing_ok=True)
        raise PlacementError(
            f"A snapshot is kept in `{file.parent}`, which could not be written: "
            f"{error}. Make it larger (docker has `--shm-size`), or do not call `keep`."
        ) from None


def _sent(saved: dict[str, Any], rank: int, source: int) -> dict[str, Any]:
    """All workers: return what the worker `source` has saved."""
    buffer = io.BytesIO()
    if rank == source:
        torch.save(saved, buffer)
    size = torch.tensor(buffer.tell())
    dist.broadcast(size, source)
    content = torch.zeros(int(size), dtype=torch.uint8)
    if rank == source:
        content = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    dist.broadcast(content, source)
    return _loaded(io.BytesIO(content.numpy().tobytes()))


def _loaded(file: BinaryIO) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise OwnCodeError(
            "The states in a snapshot are of tensors and plain values, as `torch.load` "
            f"reads them; {error}"
        ) from None
    return saved


def file_of_agent() -> Path | None:
    """Return the file of the snapshots; None if nothing starts the workers again."""
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    agent = psutil.Process(os.getppid())
    memory = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    return memory / f"{PREFIX}-{agent.pid}-{agent.create_time() * 1000:.0f}.pt"


def remove_stale(memory: Path) -> None:
    """Remove the user's files of agents that have ended, after a job that failed."""
    for file in memory.glob(f"{PREFIX}-*-*.*"):
        pid, started = file.stem.split("-")[-2:]
        with suppress(OSError, ValueError):
            if file.lstat().st_uid == os.geteuid() and not _lives(int(pid), started):
                file.unlink()


def _lives(pid: int, started: str) -> bool:
    try:
        return f"{psutil.Process(pid).create_time() * 1000:.0f}" == started
    except psutil.NoSuchProcess:
        return False


def remove_at_end(file: Path) -> None:
    """Remove a snapshot at the end of a script, unless an exception ended it."""
    if not hasattr(sys, "last_value"):
        for suffix in (".pt", ".lock"):
            file.with_suffix(suffix).unlink(missing_ok=True)
