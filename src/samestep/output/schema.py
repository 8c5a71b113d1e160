"""What a report reads of a run and of a scaling: checked and typed, nothing computed.

Fields may be missing, as older runs lack the newer ones. A measured number that is null
in a file is not finite: JSON has no other word for it.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from samestep.config.renames import rename


Measured = Annotated[
    float | None, BeforeValidator(lambda value: math.nan if value is None else value)
]
"""None where it is missing, NaN where it is not finite."""
Whole = Annotated[int, Field(ge=0, le=2**53)]
"""As exact as a float."""
StoredRecipe = Annotated[dict[str, Any], AfterValidator(rename)]
"""The fields of a recipe, those of an older run under their new names."""
Phases = dict[str, float]
"""Seconds by phase."""


class Record(BaseModel):
    """Unknown fields are kept: they are shown as they are, or not at all."""

    model_config = ConfigDict(frozen=True, extra="allow")


def measured(record: Record, name: str) -> float | None:
    """A field that only some records have; None where it is missing or no number."""
    value = getattr(record, name, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


class Timed(Record):
    """What steps and epochs have in common."""

    workers: list[Phases] = []
    waited_for: list[float] = []
    communication_share: Measured = None
    straggler_share: Measured = None
    bytes_exchanged: Measured = None
    network_bytes: Measured = None
    noise_scale: float | None = None
    samples_per_second: Measured = None


class Step(Timed):
    """A line of metrics.jsonl on the steps since the line before it."""

    epoch: Whole
    step: Whole
    loss: Measured = None
    accuracy: Measured = None
    lr: Measured = None
    at: float = 0.0
    shares: list[Whole] = []


class Epoch(Timed):
    """A line of metrics.jsonl, or an element of `epochs` in result.json."""

    epoch: Whole
    seconds: Measured = None
    train_loss: Measured = None
    train_accuracy: Measured = None
    validation_loss: Measured = None
    validation_accuracy: Measured = None
    weights_sha256: str = ""
    seconds_by_phase: Phases = {}


class Event(Record):
    """A line of events.jsonl; `seconds` since the command of that session began."""

    seconds: float
    event: str

    def get(self, name: str) -> Any:
        """A field that only some events have, or None."""
        return (self.model_extra or {}).get(name)


class Worst(Record):
    """A test sample with a high loss."""

    index: Whole
    target: Whole
    predicted: Whole
    loss: Measured = None


class Result(Record):
    """result.json."""

    recipe: StoredRecipe
    placement: dict[str, Any] = {}
    status: str
    error: str | None = None
    test_accuracy: Measured = None
    test_loss: Measured = None
    own_metrics: list[Annotated[str, Field(pattern=r"^[^\W\d]\w{0,99}$")]] = []
    """Of a loss function of the user's own."""
    baselines: dict[str, Measured] = {}
    """Bits per character that simple methods need for a text."""
    weights_sha256: str = ""
    train_seconds: Measured = None
    wall_seconds: Measured = None
    snapshot_seconds: Measured = None
    restarts: Whole = 0
    balance: dict[str, Any] = {}
    noise_scale: float | None = None
    test_confusion: list[list[Whole]] = []
    test_worst: list[Worst] = []
    epochs: list[Epoch] = []

    @property
    def metrics(self) -> list[str]:
        """What was measured besides the loss."""
        is_regression = any(hasattr(e, "train_absolute_error") for e in self.epochs)
        usual = "absolute_error" if is_regression else "accuracy"
        own = [name for name in dict.fromkeys(self.own_metrics) if name != "loss"]
        return own or [usual]


class ScalingRun(Record):
    """One round at one point of a scaling."""

    round: Whole
    steps: Whole
    seconds: Measured = None
    samples_per_second: Measured = None
    workers: list[Phases] = []
    bytes_per_step: Measured = None


class Point(Record):
    """One number of workers at one global batch: medians over the rounds."""

    kind: str
    workers: Whole
    global_batch: Whole
    exchange: str = ""
    runs: list[ScalingRun] = []
    samples_per_second: Measured = None
    low: Measured = None
    high: Measured = None
    step_seconds: Measured = None
    seconds_by_phase: Phases = {}
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    efficiency: float | None = None
    limit_speedup: float | None = None
    efficiency_of_limit: float | None = None


class Noise(Record):
    """The gradient noise scale, in samples."""

    noise_scale: Measured = None
    critical_batch: Measured = None
    at_global_batch: Whole | None = None


class Parameter(Record):
    """A fitted number with its 95% interval."""

    name: str
    value: Measured = None
    low: Measured = None
    high: Measured = None
    unit: str = ""
    meaning: str = ""


class Model(Record):
    """The fitted model of a step's time; errors are relative."""

    formula: str = ""
    parameters: list[Parameter] = []
    median_error: Measured = None
    max_error: Measured = None


class Amdahl(Record):
    """S(n) = 1 / (s + (1 - s) / n)."""

    serial_fraction: Measured = None
    low: Measured = None
    high: Measured = None


class Usl(Record):
    """X(n) = lambda n / (1 + sigma (n - 1) + kappa n (n - 1))."""

    sigma: Measured = None
    kappa: Measured = None
    peak_workers: float | None = None


class HeldOut(Record):
    """A measured point that the model had not seen, in samples per second."""

    workers: Whole
    global_batch: Whole | None = None
    predicted: Measured = None
    measured: Measured = None
    error: Measured = None


class Prediction(Record):
    """Beyond what was measured."""

    where: str
    workers: Whole
    nodes: Whole = 1
    global_batch: Whole
    samples_per_second: Measured = None
    low: float | None = None
    high: float | None = None
    speedup: float | None = None
    efficiency: float | None = None
    relative_time_to_loss: float | None = None


class Scaling(Record):
    """scaling.json."""

    version: Literal[1]
    recipe: StoredRecipe
    environment: dict[str, Any] = {}
    status: str
    settings: dict[str, Any] = {}
    points: list[Point] = []
    noise: Noise | None = None
    model: Model | None = None
    amdahl: Amdahl | None = None
    usl: Usl | None = None
    no_fit_because: str | None = None
    held_out: HeldOut | None = None
    predictions: list[Prediction] = []
    advice: list[str] = []
