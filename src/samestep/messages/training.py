"""What happens in a training: reported by a worker or by the supervisor.

A worker's reports go over its socket to the supervisor. Together with the supervisor's
own they go to the session, which keeps the run: `output.events` decides which of them
become events, `output.sentences` which are shown.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from samestep.messages.wire import ELSEWHERE, INLINE, OPTIONAL
from samestep.system.json_values import JsonObject


# From a worker.


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first step is about to begin."""

    step: int
    steps_per_epoch: int
    """0 if it is not known, like the number of samples: of a stream."""
    train_samples: int
    parameters: int
    layout: JsonObject
    """The fields of `state.layout.Layout`."""
    conditions: dict[str, str]
    torch: str
    instruction_set: str


@dataclass(frozen=True, kw_only=True)
class TimeUse:
    """The seconds that some steps took, and the bytes that workers exchanged."""

    workers: list[dict[str, float]]
    """Seconds by phase, of each worker."""
    waited_for: list[float]
    communication_share: float
    straggler_share: float
    bytes_exchanged: int
    network_bytes: int


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The steps since the last such record: a line of metrics.jsonl."""

    epoch: int
    step: int
    metrics: dict[str, float] = field(metadata=INLINE)
    lr: float
    samples_per_second: float
    times: TimeUse = field(metadata=INLINE)
    noise_scale: float | None
    own_metrics: list[str] | None = field(default=None, metadata=OPTIONAL)
    """Names of the metrics that the user's own loss function measures."""
    speeds: list[float] = field(default_factory=list)
    """Micro-batches per second that each worker is believed to reach."""
    shares: list[int] = field(default_factory=list)
    """Micro-batches that each worker owns."""
    hashes: str = field(default="", metadata=ELSEWHERE)
    """The hashes of these steps (`state.hashing.StepHashes`), for the ledger."""
    micro_batch_hashes: str = field(default="", metadata=ELSEWHERE)
    """For each of these steps and each micro-batch the hash of its gradient and the
    rank of its worker, of 16 hexadecimal digits each, if they have a ledger."""


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch: a line of metrics.jsonl, and a part of result.json."""

    epoch: int
    step: int
    seconds: float
    train_metrics: dict[str, float] = field(metadata=INLINE)
    samples_per_second: float
    seconds_by_phase: dict[str, float]
    times: TimeUse = field(metadata=INLINE)
    noise_scale: float | None
    own_metrics: list[str] | None = field(default=None, metadata=OPTIONAL)
    minor_faults_per_step: float = 0.0
    validation_metrics: dict[str, float] = field(default_factory=dict, metadata=INLINE)
    weights_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """An evaluation after some steps: a line of metrics.jsonl."""

    epoch: int
    step: int
    validation_metrics: dict[str, float] = field(metadata=INLINE)
    own_metrics: list[str] | None = field(default=None, metadata=OPTIONAL)
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class LrTried:
    """A step of a learning-rate range test."""

    lr: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class SnapshotSaved:
    """This worker has copied its part of the state into a slot of the memory."""

    slot: int
    step: int
    epochs: int
    """Complete epochs."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The training has stopped as requested, after a snapshot."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Evicted:
    """The training has stopped, to go on without its slowest worker."""

    step: int
    worker: int
    speeds: list[float]


@dataclass(frozen=True, kw_only=True)
class StragglerFound:
    """A worker without which the others would be faster."""

    step: int
    worker: int
    speed: float
    """As a share of the fastest worker's."""
    gain: float
    """The share of the time that is expected to be saved without it."""


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """Workers own other micro-batches from now on."""

    step: int
    before: list[int]
    """Micro-batches of each worker."""
    after: list[int]
    speeds_before: list[float]
    speeds: list[float]
    gain: float
    cause: str


@dataclass(frozen=True, kw_only=True)
class NoTargets:
    """No target of this step counts, so its gradient is zero."""

    step: int


@dataclass(frozen=True, kw_only=True)
class UnusedParameters:
    """Trained parameters that had no gradient in a dry run."""

    parameters: list[str]


@dataclass(frozen=True, kw_only=True)
class Prefetching:
    """A worker's helper process begins to load data, to draw samples ahead."""

    worker: int


@dataclass(frozen=True, kw_only=True)
class WorkerWarning:
    """A warning for the user."""

    worker: int
    text: str


class Span(NamedTuple):
    """A phase of a step; times in seconds on the monotonic clock of the machine."""

    step: int
    """Counted from 0 over all epochs."""
    phase: str
    start: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The trace of a worker."""

    worker: int
    spans: list[Span]


@dataclass(frozen=True, kw_only=True)
class FaultInjected:
    """A worker is about to fail on purpose; see `system.fault_injection.Fault`."""

    number: int
    kind: str
    point: str
    step: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The result of a training: a part of result.json."""

    test_metrics: JsonObject = field(metadata=INLINE)
    weights_sha256: str
    balance: JsonObject
    data: JsonObject
    arithmetic: str
    own_metrics: list[str] | None = field(default=None, metadata=OPTIONAL)
    best_epoch: int | None = field(default=None, metadata=OPTIONAL)
    best_step: int | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A worker is about to warm up for a measurement."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of a measurement job."""

    steps: int
    samples: int
    seconds: float
    step_seconds_sd: float
    workers: list[dict[str, float]]
    """Seconds by phase, of each worker."""
    bytes_per_step: int
    gradient_bytes: int
    add_seconds: float
    """Seconds to add one gradient to another."""
    noise_scale: float | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The result of an evaluation job."""

    means: dict[str, float]
    targets: int
    weights_sha256: str
    own_metrics: list[str]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A worker ends with an exception, or was ended."""

    error: str
    """The name of a class in `errors`."""
    message: str
    traceback: str | None = None
    own: str = ""
    """The part of the traceback that is in user code."""
    code: int | None = None
    """The exit code, if the worker could not report anything itself."""


# From the supervisor to the session that records them.


@dataclass(frozen=True, kw_only=True)
class WorkersStarted:
    """The processes of a new generation, by rank."""

    pids: list[int]


@dataclass(frozen=True, kw_only=True)
class SlowStart:
    """A phase before the first step takes longer than a step may."""

    phase: str
    waited: float
    """Seconds."""
    patience: float


@dataclass(frozen=True, kw_only=True)
class GenerationFailed:
    """The workers had to be ended because one of them failed."""

    final: bool | None = field(default=None, metadata=OPTIONAL)
    """Whether the training ends with it; None under torchrun, which decides that."""
    error: str
    worker: int | None
    step: int | None


@dataclass(frozen=True, kw_only=True)
class WrongWorker:
    """In a step that was computed twice, this worker's gradients were wrong."""

    step: int
    worker: int
    host: str | None = field(default=None, metadata=OPTIONAL)
    """Where it ran, on several machines."""


@dataclass(frozen=True, kw_only=True)
class Restarted:
    """A new generation goes on after `step`."""

    number: int
    step: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class CaughtUp:
    """The training is again at the step at which it failed, `after` seconds later."""

    step: int
    after: float


@dataclass(frozen=True, kw_only=True)
class CheckpointWritten:
    """A checkpoint is on disk."""

    step: int
    seconds_to_write: float


@dataclass(frozen=True, kw_only=True)
class CheckpointFailed:
    """A checkpoint could not be written."""

    step: int
    error: str


Message = (
    Started
    | StepRecord
    | EpochRecord
    | EvaluationRecord
    | LrTried
    | SnapshotSaved
    | Stopped
    | Evicted
    | StragglerFound
    | Rebalanced
    | NoTargets
    | UnusedParameters
    | Prefetching
    | WorkerWarning
    | Traced
    | FaultInjected
    | Finished
    | Ready
    | Measured
    | Evaluated
    | Failed
    | WorkersStarted
    | SlowStart
    | GenerationFailed
    | WrongWorker
    | Restarted
    | CaughtUp
    | CheckpointWritten
    | CheckpointFailed
)
