"""The messages that become lines of events.jsonl."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from samestep.files import untrusted
from samestep.messages.training import (
    CaughtUp,
    CheckpointFailed,
    CheckpointWritten,
    Evicted,
    FaultInjected,
    GenerationFailed,
    NoTargets,
    Prefetching,
    Rebalanced,
    Restarted,
    SlowStart,
    Started,
    Stopped,
    StragglerFound,
    UnusedParameters,
    WorkersStarted,
    WorkerWarning,
    WrongWorker,
)
from samestep.system.json_values import JsonObject


EVENTS: dict[type, str] = {
    CaughtUp: "caught up",
    CheckpointFailed: "checkpoint failed",
    CheckpointWritten: "checkpoint",
    Evicted: "evicted",
    FaultInjected: "fault",
    GenerationFailed: "failed",
    NoTargets: "no targets",
    Prefetching: "prefetching",
    Rebalanced: "rebalanced",
    Restarted: "restart",
    SlowStart: "slow start",
    Started: "training",
    Stopped: "stopped",
    StragglerFound: "hindered",
    UnusedParameters: "unused",
    WorkersStarted: "workers started",
    WorkerWarning: "warning",
    WrongWorker: "wrong worker",
}
"""Messages that become a line of events.jsonl, and its `event`."""


def read(lines: Iterable[str]) -> Iterator[JsonObject]:
    """Yield the events of lines of events.jsonl; damaged ones are left out."""
    for line in lines:
        with suppress(ValueError):
            event = untrusted.parse_json(line)
            if isinstance(event, dict):
                yield event


def wrong_workers(events: Iterable[JsonObject]) -> list[JsonObject]:
    """Return which workers were wrong according to events."""
    left_out = "seconds", "event"
    return [
        {name: event[name] for name in event if name not in left_out}
        for event in events
        if event.get("event") == EVENTS[WrongWorker]
    ]
