"""The messages that become lines of events.jsonl."""

from typing import NamedTuple

from samestep.messages.training import (
    CaughtUp,
    CheckpointFailed,
    CheckpointWritten,
    Evicted,
    FaultInjected,
    GenerationFailed,
    Message,
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
)
from samestep.messages.wire import as_record
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
}
"""Messages that become a line of events.jsonl, and its `event`."""


class Event(NamedTuple):
    """A line of events.jsonl without its time."""

    name: str
    fields: JsonObject


def event_of(message: Message) -> Event | None:
    """Return the event that a message becomes, or None if it becomes none."""
    if type(message) not in EVENTS:
        return None
    fields = as_record(message)
    if isinstance(message, Started):
        del fields["layout"]  # long, and in the manifest of every checkpoint
    return Event(EVENTS[type(message)], fields)
