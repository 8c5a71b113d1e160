"""The messages that become lines of events.jsonl."""

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
