"""The jobs of workers; `supervisor.job` makes their common part, the `Setup`.

A job is the first line that a worker receives, and the only one.
"""

from dataclasses import dataclass, field

from samestep.system.fault_injection import Fault
from samestep.system.json_values import JsonObject


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every worker needs to know for any job."""

    recipe: JsonObject
    """The fields of `config.recipe.Recipe`."""
    device: str
    exchange: str
    search_path: list[str]
    """Directories in which modules with user code are looked for."""
    objects: dict[str, list[list[int]]]
    """The first byte and the length of the parts of each object given in Python."""
    hang_timeout: float
    start_timeout: float
    peer_timeout: float
    spin_seconds: float
    snapshot_seconds: float
    checkpoint_steps: int | None
    balance: str | list[int]
    drop_stragglers_below: float
    prefetch: bool
    probe: bool
    verify: float
    """The share of steps that are computed twice."""
    ledger: str
    """What there are hashes of: `steps`, or `micro-batches`, too."""
    profile: int
    """Steps to trace."""
    faults: list[Fault]
    keep_checkpoints: int = 0
    """How many checkpoints are kept, after evenly spaced steps."""
    hosts: list[str] = field(default_factory=list)
    """The host of each worker; empty: all are on this machine."""
    callbacks: list[str] = field(default_factory=list)
    """References to the callbacks of rank 0."""
    lr_range: list[float] = field(default_factory=list)
    """The fields of `core.lr_range.LrRange`, to try learning rates; empty: none."""
    max_steps: int | None = None
    """Full global batches of an epoch, to try a recipe out; None: all."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Train from `step` on, whose state is in the memory for snapshots."""

    setup: Setup
    step: int = 0
    conditions: dict[str, str] = field(default_factory=dict)
    """Those of `system.conditions.FOUND_BY_WORKERS` that the run has had so far."""
    until: int | None = None
    """The step after which the workers stop, as if asked to; None: the last one."""


@dataclass(frozen=True, kw_only=True)
class MeasurementJob:
    """Train for some seconds and report how fast that was."""

    setup: Setup
    warm_up: float
    """Seconds of training before the measurement."""
    seconds: float
    is_independent: bool = False
    """Whether each worker trains alone, beside the others."""


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """Measure the weights in a file on one split."""

    setup: Setup
    model_file: str
    split: str


Job = TrainingJob | MeasurementJob | EvaluationJob


@dataclass(frozen=True, kw_only=True)
class Briefing:
    """What a leader under torchrun sends to the other workers of its machine."""

    job: TrainingJob
    environment: dict[str, str]
    names: list[str]
    """The names of the descriptors that come with it."""
