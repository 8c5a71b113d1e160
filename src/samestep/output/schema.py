"""The records of a run's and a study's files, as they are written and read.

`Run.open` and the reports read a result.json as a `Result`, the tests hold what
`RunWriter` writes to it, and the page on the run directory is made from its fields. A
field that older runs lack has a default. Numbers that are not finite are written as NaN
and Infinity; a measured number that is null is read as NaN.
"""

import math
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from samestep.config.renames import PLACEMENT_NAMES, rename
from samestep.system.json_values import JsonObject


Measured = Annotated[
    float | None, BeforeValidator(lambda value: math.nan if value is None else value)
]
"""A measured number: None where it is missing, NaN where it was not finite."""
Whole = Annotated[int, Field(ge=0, le=2**53)]
"""A count, which a float can hold exactly."""
StoredRecipe = Annotated[JsonObject, AfterValidator(rename)]
"""The fields of a recipe, those of an older run under their new names."""
StoredPlacement = Annotated[
    JsonObject, AfterValidator(partial(rename, names=PLACEMENT_NAMES))
]
"""The same for a placement."""
NotOwn = BeforeValidator(lambda value: [] if isinstance(value, float) else value)
"""Leaves out a metric of an older run's own loss, which could have the same name."""
Phases = dict[str, float]
"""Seconds by phase."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[^\W\d]\w{0,99}$")]


class Record(BaseModel):
    """A JSON object of a file; fields that it does not name are kept as they are."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        strict=True,
        use_attribute_docstrings=True,
        defer_build=True,  # workers read the names of fields only
    )


def measured(record: Record, name: str) -> float | None:
    """Return a field that only some records have, or None if it is not a number."""
    value = getattr(record, name, None)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def first_error(error: ValidationError) -> str:
    """Return the place of the first wrong field, and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "its content"
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}"


class Timed(Record):
    """The fields that steps and epochs have in common."""

    samples_per_second: Measured = None
    """throughput of all workers together"""
    workers: list[Phases] = []
    """seconds by phase of each worker: `data`, `forward`, `backward`, `exchange`,
    `wait`, `optimizer`, `snapshot`, `other`; in your own loop `compute` is forward and
    backward, `exchange` includes waiting"""
    waited_for: list[float] = []
    """for each worker, the seconds that the others waited for it"""
    communication_share: Measured = None
    """share of the time spent in `exchange` and `wait`"""
    straggler_share: Measured = None
    """share of the time spent in `wait`"""
    bytes_exchanged: Measured = None
    """bytes that all workers read from each other's memory, or received"""
    network_bytes: Measured = None
    """the part of `bytes_exchanged` that went from one machine to another"""
    minor_faults_per_step: Measured = None
    """page faults: near 0 once warm"""
    noise_scale: float | None = None
    """the gradient noise scale, in samples"""
    own_metrics: list[Name] = []
    """names of the metrics that your own loss reports"""


class Step(Timed):
    """A line of metrics.jsonl on the steps since the line before it."""

    epoch: Whole
    """counted from 1"""
    step: Whole
    """optimizer steps so far"""
    loss: Measured = None
    """mean since the last logged step"""
    accuracy: Measured = None
    """the same; regression has `absolute_error` instead, your own metrics as named"""
    lr: Measured = None
    """the learning rate"""
    at: float = 0.0
    """seconds since the command began"""
    speeds: list[float] = []
    """micro-batches per second of each worker"""
    shares: list[Whole] = []
    """micro-batches owned by each worker"""


class Epoch(Timed):
    """A line of metrics.jsonl, and an element of `epochs` in result.json."""

    epoch: Whole
    """counted from 1"""
    step: Whole | None = None
    """optimizer steps at its end; with `max_steps`, the last epoch may end early"""
    seconds: Measured = None
    """duration, without evaluation"""
    train_loss: Measured = None
    """over all samples, while the weights changed"""
    train_accuracy: Measured = None
    """the same; regression has `train_absolute_error` instead"""
    validation_loss: Measured = None
    """after the epoch"""
    validation_accuracy: Measured = None
    """after the epoch"""
    weights_sha256: Sha256 | None = None
    """fingerprint of the weights after the epoch"""
    seconds_by_phase: Phases = {}
    """mean over the workers"""


class Evaluation(Record):
    """A line of metrics.jsonl, and an element of `evaluations` in result.json."""

    epoch: Whole
    """counted from 1"""
    step: Whole
    """optimizer steps so far"""
    validation_loss: Measured = None
    """after this step"""
    validation_accuracy: Measured = None
    """the same; regression has `validation_absolute_error` instead"""
    own_metrics: list[Name] = []
    """names of the metrics that your own loss reports"""
    weights_sha256: Sha256 | None = None
    """fingerprint of the weights after this step"""
    at: float = 0.0
    """in metrics.jsonl: seconds since the command began"""


class Event(Record):
    """A line of events.jsonl; `seconds` since the command of that session began."""

    seconds: float
    event: str

    def get(self, name: str) -> Any:
        """Return a field that only some events have, or None."""
        return (self.model_extra or {}).get(name)


class Worst(Record):
    """A test sample with a high loss."""

    index: Whole
    target: Whole
    predicted: Whole
    loss: Measured = None


class WrongWorker(Record):
    """A worker whose gradients were wrong."""

    step: Whole
    worker: Whole
    host: str | None = None
    """on several machines: where it ran"""


class Result(Record):
    """result.json."""

    recipe: StoredRecipe
    """resolved: every default replaced by its value; of your own loop, the content of
    `loop.toml`"""
    placement: StoredPlacement = {}
    """resolved: every `auto` replaced by what was chosen"""
    status: Annotated[str, Field(pattern=r"^[a-z ]{1,40}$")]
    """`finished`, `failed` or `interrupted`"""
    error: str | None = None
    """why the training failed"""
    failed_rank: Whole | None = None
    """the worker that failed, if it was one"""
    weights_sha256: Sha256 | None = None
    """[fingerprint](../exactness.md#the-fingerprint) of the final weights"""
    arithmetic: (
        Annotated[str, Field(pattern=r"^(torch|portable-[0-9]{1,9})$")] | None
    ) = None
    """`torch`, or `portable-` and the version of its
    [specification](../arithmetic.md)"""
    ledger_sha256: Sha256 | None = None
    """the last SHA-256 of the chain in `ledger`"""
    micro_batch_ledger_sha256: Sha256 | None = None
    """with `ledger = "micro-batches"`: that of the chain in `ledger-micro-batches`"""
    test_loss: Measured = None
    """of the final weights"""
    test_accuracy: Measured = None
    """of the final weights; regression has `test_absolute_error` instead, your own
    metrics are `test_` and their names"""
    own_metrics: list[Name] = []
    """names of the metrics that your own loss reports"""
    test_confusion: Annotated[list[list[Whole]], NotOwn] = []
    """for classes: counts [actual][predicted]"""
    test_worst: Annotated[list[Worst], NotOwn] = []
    """for classes: the test samples with the highest losses"""
    baselines: dict[str, Measured] = {}
    """for text: the bits per character that simple methods need"""
    skipped: Whole = 0
    """for image folders: files that were left out because they could not be read"""
    data: JsonObject = {}
    """shapes, number of outputs, task"""
    train_seconds: Measured = None
    """over all epochs, without start-up and evaluation"""
    wall_seconds: Measured = None
    """from the start of the command to this file"""
    snapshot_seconds: Measured = None
    """for which the workers stood still to save their state"""
    restarts: Whole = 0
    """generations of workers after the first"""
    wrong_workers: list[WrongWorker] = []
    """with `verify`: the steps, and which `worker` got wrong gradients in them"""
    noise_scale: float | None = None
    """the gradient noise scale, in samples"""
    balance: JsonObject = {}
    """share of the time that balancing saved, the last speeds, which workers lagged"""
    best_epoch: Whole | None = None
    """with early stopping: the epoch of the weights that were kept"""
    best_step: Whole | None = None
    """the steps that had been taken then"""
    evaluations: list[Evaluation] = []
    """with `evaluation_steps`: a record for each evaluation, as below"""
    epochs: list[Epoch] = []
    """a record for each epoch, as below"""

    @property
    def metrics(self) -> list[str]:
        """The names of what was measured besides the loss."""
        is_regression = any(hasattr(e, "train_absolute_error") for e in self.epochs)
        usual = "absolute_error" if is_regression else "accuracy"
        own = [name for name in dict.fromkeys(self.own_metrics) if name != "loss"]
        return own or [usual]


class Point(Record):
    """One number of workers at one global batch: medians over the rounds."""

    kind: str
    workers: Whole
    global_batch: Whole
    micro_batches: Whole = 0
    exchange: str = ""
    runs: list[JsonObject] = []
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

    def share(self, phase: str) -> float:
        """Return the share of a phase in the time of a step."""
        total = sum(self.seconds_by_phase.values()) or 1.0
        return self.seconds_by_phase.get(phase, 0.0) / total


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
    cores: Whole | None = None
    not_told_apart: list[str] = []


class HeldOut(Record):
    """A measured point that the model had not seen, in samples per second."""

    workers: Whole
    global_batch: Whole | None = None
    predicted: Measured = None
    measured: Measured = None
    error: Measured = None


class Prediction(Record):
    """The speed at a number of workers that was not measured."""

    where: str
    workers: Whole
    nodes: Whole = 1
    global_batch: Whole
    micro_batches: Whole = 0
    samples_per_second: Measured = None
    low: float | None = None
    high: float | None = None
    speedup: float | None = None
    efficiency: float | None = None
    relative_time_to_loss: float | None = None


class Analysis(Record):
    """What is computed from the measurements of a study."""

    points: list[Point] = []
    noise: Noise | None = None
    model: Model | None = None
    no_fit_because: str | None = None
    held_out: HeldOut | None = None
    predictions: list[Prediction] = []
    advice: list[str] = []


class Scaling(Analysis):
    """scaling.json."""

    version: Literal[1]
    recipe: StoredRecipe
    environment: JsonObject = {}
    status: str
    settings: JsonObject = {}
