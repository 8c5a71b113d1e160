"""The Python API: train, resume and evaluate, from a script or the command line."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from samestep.api import check
from samestep.api.check import Verdict
from samestep.api.run import Run
from samestep.config import bf16
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.data.sources import checksums as data_checksums
from samestep.data.sources import source_of
from samestep.errors import PlacementError, RunError, did_you_mean, warn_old_name
from samestep.messages.job import EvaluationJob
from samestep.messages.training import Evaluated, Message
from samestep.messages.wire import JsonObject
from samestep.output.console import View, make_view
from samestep.output.logs import temporary_logs
from samestep.output.run import read_recipe
from samestep.output.run_writer import RunWriter
from samestep.output.tensorboard import TensorBoard
from samestep.output.trackers import Tracker, Tracking, load
from samestep.state import pretrained
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import run_workers
from samestep.supervisor.recovery import build_of
from samestep.supervisor.resume import find_start
from samestep.supervisor.session import Session, supervise
from samestep.system.log import shown_on_stderr
from samestep.system.signals import Stop
from samestep.user_code.arguments import (
    Part,
    check_trusted,
    packed,
    recipe_of,
    split_fields,
)
from samestep.user_code.references import checksums


@dataclass(frozen=True)
class Evaluation:
    """Weights measured on one split."""

    means: Mapping[str, float]
    """`loss`, and `accuracy`, `absolute_error` (regression) or your own metrics."""
    targets: int
    """The number of samples, or of tokens to predict."""
    weights_sha256: str
    own_metrics: Sequence[str] = ()
    """The names of the metrics of your own loss function."""

    @property
    def loss(self) -> float:
        """The mean loss per target, without label smoothing."""
        return self.means["loss"]

    @property
    def accuracy(self) -> float:
        """The share of right answers. Raises KeyError for a regression."""
        return self.means["accuracy"]


def train(
    recipe: Recipe | str | Path | None = None,
    placement: Placement | None = None,
    *,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    trackers: Iterable[Tracker | str] = (),
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
    **fields: Any,
) -> Run:
    """Train a recipe: a Recipe, the name of a built-in one, or the path of a TOML file.

    The result depends on the recipe alone. `model`, `data` and `loss` replace parts of
    it by your own (docs/own-code.md): functions, classes, modules, tensors or data
    sets, defined anywhere, also in a notebook. `fields` are further fields of the
    recipe (`epochs=3`, `optimizer__lr=0.1`, or `lr` for short) and of the placement
    (`workers=2`). Each of `trackers`, a callable or its name `"module:function"`, gets
    the records of metrics.jsonl (docs/tracking.md). Progress and warnings go to the
    logger `samestep`, which prints on stderr unless logging is configured; on a
    terminal there is also a live table. A `SilentView` of `samestep.output.console` as
    `view` turns off both. A `server` that is already running saves the two seconds of
    importing torch; `started` is the time.monotonic() from which `wall_seconds` counts.

    Raises a UsageError before anything is started, a TrainingError after, and
    Interrupted after a signal. No process is left.
    """
    started = time.monotonic() if started is None else started
    changed, placed = split_fields(fields)
    placement = _placed(placement, placed)
    with (
        _server(server) as running,
        packed({"model": model, "data": data, "loss": loss}) as (names, given),
    ):
        trackers = _loaded(trackers)
        recipe = recipe_of(recipe, names, changed)
        check_trusted(recipe, names)
        recipe = pretrained.resolved(recipe)
        placement, why = placement.resolve(recipe.micro_batches, running.gpus)
        notice = source_of(recipe.data).prepare()
        with (
            RunWriter.create(recipe, placement, started) as writer,
            _observed(writer, view, trackers) as shown,
        ):
            shown.note(_headline(recipe, why))
            facts, conditions = described(recipe)
            writer.start("started", facts, running.device(placement.device))
            session = Session(writer, shown, conditions)
            record = supervise(session, running, given, notice)
            return Run(record.path, record.result)


def resume(
    run: Run | str | Path,
    placement: Placement | None = None,
    *,
    epochs: int | None = None,
    allow_different_numerics: bool = False,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    trackers: Iterable[Tracker | str] = (),
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
    **placed: Any,
) -> Run:
    """Continue a run from its newest checkpoint, with any workers and exchange.

    The final weights are those of the uninterrupted training. `epochs` is the new total
    for a run whose schedule does not depend on the number of epochs. A recipe, torch
    version, processor, user code or other condition of the numerics that differs from
    the checkpoint's is refused, unless `allow_different_numerics`. Objects that were
    given to `train` as `model`, `data` or `loss` must be given again. `placed` are
    fields of the placement (`workers=2`). Raises like `train`; RunError and
    CheckpointError say why the run cannot be continued.
    """
    started = time.monotonic() if started is None else started
    if "accept_other_bits" in placed:
        warn_old_name("accept_other_bits", "allow_different_numerics")
        allow_different_numerics = placed.pop("accept_other_bits")
    placement = _placed(placement, placed)
    path = run.path if isinstance(run, Run) else Path(run)
    with (
        _server(server) as running,
        packed({"model": model, "data": data, "loss": loss}) as (names, given),
    ):
        trackers = _loaded(trackers)
        start = find_start(path, epochs, names)
        check_trusted(start.recipe, names)
        pretrained.resolved(start.recipe)
        placement, why = placement.resolve(start.recipe.micro_batches, running.gpus)
        notice = source_of(start.recipe.data).prepare()
        with (
            RunWriter.reopen(path, start.recipe, placement, started) as writer,
            _observed(writer, view, trackers) as shown,
        ):
            # Again: another process may have written before the lock was held.
            start = find_start(path, epochs, names)
            facts, conditions = described(start.recipe)
            most = placement.max_restarts
            build = build_of(running, placement.device, most) | conditions
            warnings = [] if allow_different_numerics else start.check(build)
            shown.note(_headline(start.recipe, why))
            for warning in [*start.warnings, *warnings]:
                shown.warn(warning)
            shown.note(start.headline)
            writer.rewind(start.step, start.epochs)
            writer.start("resumed", facts, running.device(placement.device))
            session = Session(writer, shown, conditions)
            kept = {} if allow_different_numerics else start.kept
            record = supervise(session, running, given, notice, start.checkpoint, kept)
            return Run(record.path, record.result)


def evaluate(
    run_or_model: Run | str | Path,
    placement: Placement | None = None,
    *,
    split: str = "test",
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    server: ForkServer | None = None,
    **placed: Any,
) -> Evaluation:
    """Measure the weights of a run or of a model file; exact at any number of workers.

    Objects that were given to `train` as `model`, `data` or `loss` must be given again.
    `placed` are fields of the placement (`workers=2`). Raises RunError if there are no
    weights.
    """
    model_file = _model_file(run_or_model)
    reports: list[Message] = []
    with (
        _server(server) as running,
        packed({"model": model, "data": data, "loss": loss}) as (names, given),
        temporary_logs() as logs,
    ):
        resolved, _ = _placed(placement, placed).resolve(None, running.gpus)
        recipe = recipe_of(read_recipe(model_file), names, {})
        check_trusted(recipe, names)
        source_of(recipe.data).prepare()
        run_workers(
            running,
            EvaluationJob(
                setup=make_setup(recipe, resolved, given),
                model_file=str(model_file.absolute()),
                split=split,
            ),
            resolved.num_workers,
            logs,
            reports.append,
            Stop(),
            given.memories,
        )
    (evaluated,) = (each for each in reports if isinstance(each, Evaluated))
    return Evaluation(**vars(evaluated))


def check_exactness(
    recipe: Recipe | str | Path | None = None,
    *,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    server: ForkServer | None = None,
    **fields: Any,
) -> Verdict:
    """Check with a few steps that a recipe gives the same bits at any placement.

    Takes the arguments of `train`, and raises like it.
    """
    changed, _ = split_fields(fields)
    with (
        _server(server) as running,
        packed({"model": model, "data": data, "loss": loss}) as (names, given),
    ):
        resolved = recipe_of(recipe, names, changed)
        check_trusted(resolved, names)
        resolved = pretrained.resolved(resolved)
        source_of(resolved.data).prepare()
        return check.check(resolved, running, given)


def _server(server: ForkServer | None) -> AbstractContextManager[ForkServer]:
    """Return the given server, which keeps running, or one for this call."""
    return ForkServer() if server is None else nullcontext(server)


def described(recipe: Recipe) -> tuple[JsonObject, dict[str, str]]:
    """Return the facts on data and code for the run's record, and what a resume needs.

    The latter are the conditions that must be the same to continue the run.
    """
    facts, code = source_of(recipe.data).describe(), checksums(recipe)
    conditions = data_checksums(facts) | bf16.conditions(recipe)
    return facts | code, code | conditions


def _placed(placement: Placement | None, fields: Mapping[str, Any]) -> Placement:
    """Return the placement with these fields. Raises PlacementError."""
    before = placement.model_dump() if placement else {}
    try:
        return Placement.model_validate({**before, **fields})
    except ValidationError as error:
        first = error.errors()[0]
        name, known = str(first["loc"][0]), list(Placement.model_fields)
        hint = "" if name in known else did_you_mean(name, known)
        raise PlacementError(
            f"`{name}`: {first['msg'][0].lower()}{first['msg'][1:]}; received "
            f"`{first['input']!r}`.{hint}"
        ) from None


def _loaded(trackers: Iterable[Tracker | str]) -> list[Tracker]:
    return [load(each) if isinstance(each, str) else each for each in trackers]


@contextmanager
def _observed(
    writer: RunWriter, view: View | None, trackers: Iterable[Tracker]
) -> Iterator[View]:
    """Show a training and call its trackers; yield the view."""
    with (
        shown_on_stderr(),
        view or make_view(writer.recipe) as shown,
        tracking(writer, shown, trackers),
    ):
        yield shown


def tracking(writer: RunWriter, view: View, trackers: Iterable[Tracker]) -> Tracking:
    """Attach the trackers, and TensorBoard's, to the run's writer; return them."""
    if writer.placement.tensorboard:
        trackers = [TensorBoard(writer.path / "tensorboard"), *trackers]
    tracking = Tracking(trackers, view.warn)
    writer.on_record = tracking.send
    return tracking


def _headline(recipe: Recipe, why: str) -> str:
    threads = "1 thread" if recipe.threads == 1 else f"{recipe.threads} threads"
    return f"{recipe.name}: {why}, {threads} each"


def _model_file(run_or_model: Run | str | Path) -> Path:
    if isinstance(run_or_model, Run):
        return run_or_model.model_file
    path = Path(run_or_model)
    if path.is_dir():
        run = Run.open(path)
        run.require_weights()
        return run.model_file
    if not path.exists():
        raise RunError(f"There is no run directory or model file {path}.")
    return path
