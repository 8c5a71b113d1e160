"""Writes checkpoints in the background and decides which to keep.

The newest two valid ones are kept and the best by validation loss. A thread of the
supervisor writes, so workers stand still only while they copy a snapshot, and no worker
of an older generation can write at all.
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
from typing import Any

from samestep.config.recipe import Recipe
from samestep.errors import CheckpointError, OutputError
from samestep.output.fence import Fence
from samestep.state import checkpoint
from samestep.state.layout import Layout
from samestep.state.snapshot import State


WRITING_SHARE = 0.05
"""At most so much of the time is spent writing; newer states replace waiting ones."""
LOWEST_PRIORITY = 19
READ_SECONDS = 1.0
"""Deadline for all workers to finish the snapshot that rank 0 has announced."""

Tell = Callable[[str, dict[str, Any]], None]
"""(event, fields): `checkpoint` or `checkpoint failed`."""


@dataclass
class Keeper:
    """One run's checkpoints. Leaving it writes what still waits."""

    run: Path
    recipe: Recipe
    build: Mapping[str, str]
    """What decides bits besides the recipe."""
    tell: Tell
    fence: Fence
    failure: str = ""
    """Why the last checkpoint could not be written, if it could not."""
    _waiting: tuple[Callable[[], State | None], Layout, list[Any], int] | None = None
    _ended: bool = False
    _news: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None
    _verified: set[int] = field(default_factory=set)

    def __enter__(self) -> "Keeper":
        directory = checkpoint.directory_of(self.run)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._thread = threading.Thread(target=self._work, name="checkpoints")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def finish(self) -> None:
        """Writes what still waits, and ends."""
        with self._news:
            self._ended = True
            self._news.notify()
        assert self._thread is not None
        self._thread.join()

    def offer(
        self,
        read: Callable[[], State | None],
        layout: Layout,
        epochs: list[dict[str, Any]],
        step: int,
    ) -> None:
        """`read` gives the state of `step` if all workers have saved it, else None."""
        with self._news:
            self._waiting = read, layout, epochs, step
            self._news.notify()

    def newest(self) -> int | None:
        """The step of the newest checkpoint on disk that can be used."""
        directory = checkpoint.directory_of(self.run)
        steps = reversed(checkpoint.steps(directory))
        return next((step for step in steps if self._is_valid(directory, step)), None)

    def write(self, state: State, layout: Layout, epochs: list[dict[str, Any]]) -> bool:
        """Now; tells what happened, and whether it worked."""
        directory = checkpoint.directory_of(self.run)
        start = time.monotonic()
        try:
            if not self.fence.holds:  # the training finds out, too, and ends
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
        self._say("checkpoint", step=state.step, seconds_to_write=seconds)
        with contextlib.suppress(OSError):
            self._prune(directory)
        return True

    def _fail(self, step: int, error: Exception) -> None:
        """Whatever it was, such as a MemoryError: later checkpoints may succeed."""
        self.failure = (
            getattr(error, "strerror", None) or str(error) or type(error).__name__
        )
        self._say("checkpoint failed", step=step, error=self.failure)

    def _say(self, event: str, **fields: Any) -> None:
        """The terminal or the right to write the run may be lost: no reason to end."""
        with contextlib.suppress(OSError, OutputError):
            self.tell(event, fields)

    def _work(self) -> None:
        """Copies each offered state at once; writes it when it may."""
        _yield_to_workers()
        held: tuple[State, Layout, list[Any]] | None = None
        allowed = 0.0
        while True:
            with self._news:
                if not self._waiting and not self._ended:
                    pause = max(0.0, allowed - time.monotonic()) if held else None
                    self._news.wait(pause)
                (waiting, self._waiting), ended = (self._waiting, None), self._ended
            if waiting and (state := self._copy(*waiting)):
                held = state, *waiting[1:3]
            if held and held[0].step in self._verified:  # as when a run ends
                held = None
            if held and (ended or time.monotonic() >= allowed):
                start = time.monotonic()
                self.write(*held)
                held = None
                allowed = time.monotonic() + (time.monotonic() - start) / WRITING_SHARE
            if ended and not self._waiting:
                return

    def _copy(self, read: Callable[[], State | None], *rest: Any) -> State | None:
        """What was offered; None if the workers did not save all of it."""
        end = time.monotonic() + READ_SECONDS
        try:
            while (state := read()) is None and time.monotonic() < end:
                time.sleep(0.005)
        except Exception as error:
            self._fail(rest[-1], error)
            return None
        return state

    def _prune(self, directory: Path) -> None:
        """Removes what is neither among the newest two valid ones nor the best."""
        valid, best = 0, self._best(directory)
        for step in reversed(checkpoint.steps(directory)):
            if valid >= 2 and step != best:
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
        """The step of the checkpoint with the lowest validation loss at its epoch."""
        losses = {}
        for step in checkpoint.steps(directory):
            with contextlib.suppress(OSError, CheckpointError):
                manifest = checkpoint.read_manifest(checkpoint.path_of(directory, step))
                if manifest.epochs and manifest.progress.epoch.targets == 0:
                    losses[step] = manifest.epochs[-1].get("validation_loss")
        measured = {step: loss for step, loss in losses.items() if loss is not None}
        return min(measured, key=lambda step: measured[step], default=None)


def _yield_to_workers() -> None:
    """This thread takes only the time that workers leave; elsewhere than on Linux, a
    priority belongs to the whole process, and stays as it is."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
