"""The messages that become lines of events.jsonl."""

from collections.abc import Sequence
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


def wrong_workers(lines: Sequence[str]) -> list[JsonObject]:
    """Return which workers were wrong, according to lines of events.jsonl."""
    found, left_out = list[JsonObject](), ("seconds", "event")
    for line in lines:
        with suppress(ValueError):
            event = untrusted.parse_json(line)
            if isinstance(event, dict) and event.get("event") == EVENTS[WrongWorker]:
                found.append({k: v for k, v in event.items() if k not in left_out})
    return found
