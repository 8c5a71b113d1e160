"""Write checkpoints in the background, and decide which to keep.

The newest two valid ones are kept, the one with the lowest validation loss, and those
after steps that were chosen before. A
thread of the supervisor writes them, so workers only stop to copy a snapshot into
memory, and no worker of an older generation can write at all.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from samestep.config.recipe import Recipe
from samestep.errors import CheckpointError, OutputError
from samestep.messages.training import CheckpointFailed, CheckpointWritten
from samestep.output.fence import Fence
from samestep.state import checkpoint
from samestep.state.layout import Layout
from samestep.state.snapshot import State
from samestep.system.json_values import JsonObject


WRITING_SHARE = 0.05
"""The share of the time that is spent writing, at most. A newer state replaces one that
waits."""
LOWEST_PRIORITY = 19
READ_SECONDS = 1.0
"""Deadline for all workers to finish the snapshot that rank 0 has announced."""


@dataclass(frozen=True)
class Offer:
    """A snapshot that may become a checkpoint."""

    read: Callable[[], State | None]
    """Returns the state of `step` once all workers have saved it, else None."""
    layout: Layout
    epochs: list[JsonObject]
    """The records of complete epochs."""
    step: int


Copied = tuple[State, Layout, list[JsonObject]]
"""A snapshot, its layout, and the records of complete epochs."""


@dataclass
class CheckpointWriter:
    """The checkpoints of one run. Leaving it writes the state that still waits."""

    run: Path
    recipe: Recipe
    build: Mapping[str, str]
    """What decides bits besides the recipe."""
    report: Callable[[CheckpointWritten | CheckpointFailed], None]
    """Called from the thread that writes."""
    fence: Fence
    kept: frozenset[int] = frozenset()
    """Steps whose checkpoints are written in any case, and kept."""
    failure: str = ""
    """Why the last checkpoint could not be written, if so."""
    _waiting: Offer | None = None
    _kept: list[Copied] = field(default_factory=list)
    """Those of chosen steps that wait."""
    _ended: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _verified: set[int] = field(default_factory=set)

    def __enter__(self) -> "CheckpointWriter":
        directory = checkpoint.directory_of(self.run)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="checkpoints")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Write the state that still waits, and end the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        assert self._thread is not None
        self._thread.join()

    def offer(self, offer: Offer) -> None:
        """Offer a snapshot to the thread; replaces one that waits.

        One of a chosen step is copied here, since the thread may be writing.
        """
        copied = None
        if offer.step in self.kept and offer.step not in self._verified:
            copied = self._copy(offer)
        with self._changed:
            if copied:
                self._kept.append(copied)
            else:
                self._waiting = offer
            self._changed.notify()

    def newest(self) -> int | None:
        """Return the step of the newest checkpoint on disk that can be used."""
        directory = checkpoint.directory_of(self.run)
        steps = reversed(checkpoint.steps(directory))
        return next((step for step in steps if self._is_valid(directory, step)), None)

    def write(self, state: State, layout: Layout, epochs: list[JsonObject]) -> bool:
        """Write a checkpoint now and report it; return whether that worked."""
        directory = checkpoint.directory_of(self.run)
        start = time.monotonic()
        try:
            if not self.fence.holds:  # the training notices, too, and ends
                return False
            path = checkpoint.write(
                directory, state, layout, self.recipe, self.build, epochs
            )
            checkpoint.load(path)
        except Exception as error:
            self._fail(state.step, error)
            return False
        self._verified.add(state.step)
        self.failure = ""
        seconds = time.monotonic() - start
        self._try_report(CheckpointWritten(step=state.step, seconds_to_write=seconds))
        with contextlib.suppress(OSError):
            self._prune(directory)
        return True

    def _fail(self, step: int, error: Exception) -> None:
        # Even after a MemoryError later checkpoints may succeed.
        self.failure = (
            getattr(error, "strerror", None) or str(error) or type(error).__name__
        )
        self._try_report(CheckpointFailed(step=step, error=self.failure))

    def _try_report(self, message: CheckpointWritten | CheckpointFailed) -> None:
        # The terminal or the right to write the run may be lost: no reason to end.
        with contextlib.suppress(OSError, OutputError):
            self.report(message)

    def _work(self) -> None:
        """Copy each offered state at once, and write it when there is time.

        Copying cannot wait: the workers soon write the same slot again.
        """
        _lower_priority()
        copied: Copied | None = None
        allowed = 0.0
        while True:
            with self._changed:
                if not self._waiting and not self._kept and not self._ended:
                    pause = max(0.0, allowed - time.monotonic()) if copied else None
                    self._changed.wait(pause)
                (offer, self._waiting), ended = (self._waiting, None), self._ended
                kept, self._kept = self._kept, []
            if offer and (newer := self._copy(offer)):
                copied = newer
            for each in kept:
                self.write(*each)
            if copied and copied[0].step in self._verified:  # as when a run ends
                copied = None
            if copied and (ended or time.monotonic() >= allowed):
                start = time.monotonic()
                self.write(*copied)
                copied = None
                allowed = time.monotonic() + (time.monotonic() - start) / WRITING_SHARE
            if ended and not self._waiting and not self._kept:
                return

    def _copy(self, offer: Offer) -> Copied | None:
        """Return what was offered; None if not all workers saved it."""
        end = time.monotonic() + READ_SECONDS
        try:
            while (state := offer.read()) is None and time.monotonic() < end:
                time.sleep(0.005)
        except Exception as error:
            self._fail(offer.step, error)
            return None
        return (state, offer.layout, offer.epochs) if state else None

    def _prune(self, directory: Path) -> None:
        """Remove all but the newest two valid ones, the best one and those to keep."""
        valid, best = 0, self._best(directory)
        for step in reversed(checkpoint.steps(directory)):
            if valid >= 2 and step != best and step not in self.kept:
                shutil.rmtree(checkpoint.path_of(directory, step))
            elif self._is_valid(directory, step):
                valid += 1

    def _is_valid(self, directory: Path, step: int) -> bool:
        if step not in self._verified:
            with contextlib.suppress(OSError, CheckpointError):
                checkpoint.load(checkpoint.path_of(directory, step))
                self._verified.add(step)
        return step in self._verified

    def _best(self, directory: Path) -> int | None:
        """Return the step of the checkpoint with the lowest validation loss."""
        losses = {}
        for step in checkpoint.steps(directory):
            with contextlib.suppress(OSError, CheckpointError):
                manifest = checkpoint.read_manifest(checkpoint.path_of(directory, step))
                losses[step] = manifest.progress.validation_loss
                is_older = "validation_loss" not in manifest.progress.model_fields_set
                if is_older and manifest.epochs and not manifest.progress.epoch.targets:
                    losses[step] = manifest.epochs[-1].get("validation_loss")
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=lambda step: measured[step], default=None)


def _lower_priority() -> None:
    """Let workers go first; only on Linux does a thread have a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
