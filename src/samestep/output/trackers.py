"""Calls trackers with every record of a run; they can neither slow it down nor end it.

A tracker is a callable. It receives the records of metrics.jsonl one at a time, before
them `{"type": "started", "recipe", "placement", "run", "step"}`, and after them the
content of result.json as `{"type": "finished"|"failed"|"interrupted", ...}`.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any

from samestep.user_code import imports


Record = dict[str, Any]
Tracker = Callable[[Record], object]

FINISH_SECONDS = 30.0
"""Time for trackers to finish after the end of the training."""
HURRY_SECONDS = 5.0
"""The same after a signal, since a second one or a kill may follow."""
MOST_WAITING = 10_000
"""Records of about 2 kB each: more would be a memory leak, not a queue."""


class Tracking(AbstractContextManager["Tracking"]):
    """The trackers of one run. Leaving it waits for them, within a deadline."""

    def __init__(
        self, trackers: Iterable[Tracker], warn: Callable[[str], None]
    ) -> None:
        """Start a thread for each tracker; `warn` is called from several threads."""
        self._followers = [Follower(tracker, warn) for tracker in trackers]
        self._expects_end = False

    def __exit__(self, _: object, error: BaseException | None, *rest: object) -> None:
        """Send an end to every tracker that got a start, and wait for them all."""
        if self._expects_end:
            self.send({"type": "failed", "error": str(error)})
        is_calm = error is None or isinstance(error, Exception)
        seconds = FINISH_SECONDS if is_calm else HURRY_SECONDS
        for follower in self._followers:
            follower.ask_to_finish()
        end = time.monotonic() + seconds
        for follower in self._followers:
            follower.await_finish(end, seconds)

    def send(self, record: Mapping[str, Any]) -> None:
        """Queue a copy of the record for every tracker; return at once."""
        self._expects_end = record["type"] in ("started", "step", "epoch", "evaluation")
        for follower in self._followers:
            follower.send(record)


class Follower:
    """One tracker and its own thread, so that none waits for another's network."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        """Start the thread."""
        self._tracker, self._warn = tracker, warn
        self._name = _name(tracker)
        self._is_on = True
        # Without a bound: a full queue would have to drop records or block the only
        # reader of the workers' messages. `send` gives up on the tracker instead.
        self._waiting: SimpleQueue[Record | None] = SimpleQueue()
        # A daemon: a tracker that hangs must not keep the process alive.
        self._thread = threading.Thread(
            target=self._work, name=f"tracker {self._name}", daemon=True
        )
        self._thread.start()

    def send(self, record: Mapping[str, Any]) -> None:
        """Queue a copy of the record, unless the tracker is switched off."""
        if self._is_on and self._waiting.qsize() >= MOST_WAITING:
            self._switch_off(f"is {MOST_WAITING:,} records behind")
        if self._is_on:
            self._waiting.put(copy.deepcopy(dict(record)))

    def ask_to_finish(self) -> None:
        """Mark the end: no record follows."""
        self._waiting.put(None)

    def await_finish(self, end: float, seconds: float) -> None:
        """Wait until `end` by time.monotonic(), `seconds` after `ask_to_finish`."""
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            # The queue holds the None of `ask_to_finish`, but not the record at work.
            left = self._waiting.qsize()
            records = "1 record" if left == 1 else f"{left} records"
            self._switch_off(f"has not taken its last {records} within {seconds:g} s")

    def _work(self) -> None:
        while (record := self._waiting.get()) is not None and self._is_on:
            try:
                self._tracker(record)
            except BaseException as error:  # even SystemExit ends only the tracker
                self._switch_off(f"failed: {imports.explain(error)}")

    def _switch_off(self, why: str) -> None:
        """Warn of the reason, once."""
        if self._is_on:
            self._is_on = False
            self._warn(
                f"The tracker `{self._name}` {why}. It is switched off; the training "
                "and its files are not affected."
            )


def _name(tracker: Tracker) -> str:
    named = tracker if hasattr(tracker, "__qualname__") else type(tracker)
    return f"{named.__module__}:{named.__qualname__}"
