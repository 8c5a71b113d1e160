"""The Python API: train and resume, from a script or the command line."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samestep.api.resolving import resolved
from samestep.api.run import Run
from samestep.config import bf16
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.data.sources import checksums as data_checksums
from samestep.data.sources import source_of
from samestep.errors import RunError, warn_old_name
from samestep.kernels.interface import ARITHMETIC
from samestep.output.console import View, make_view
from samestep.output.ledger import MICRO_BATCHES
from samestep.output.run import Settings
from samestep.output.run_writer import RunWriter
from samestep.output.tensorboard import TensorBoard
from samestep.output.trackers import Tracker, Tracking
from samestep.supervisor.forkserver_client import ForkServer, given_or_new
from samestep.supervisor.recovery import build_of
from samestep.supervisor.resume import Start, find_start
from samestep.supervisor.session import Session, supervise
from samestep.system.json_values import JsonObject
from samestep.system.log import shown_on_stderr
from samestep.user_code.arguments import (
    Part,
    apart,
    batch_of,
    numbered,
    packed,
    placement_of,
    recipe_of,
    split_fields,
    split_parts,
)
from samestep.user_code.imports import load
from samestep.user_code.references import check_callbacks, checksums


def train(
    recipe: Recipe | str | Path | None = None,
    placement: Placement | None = None,
    *,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    schedule: Part | None = None,
    callbacks: Iterable[Part] = (),
    trackers: Iterable[Tracker | str] = (),
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
    **fields: Any,
) -> Run:
    """Train a recipe: a Recipe, the name of a built-in one, or the path of a TOML file.

    The result depends on the recipe alone. `model`, `data`, `loss`, `optimizer` and
    `schedule` replace parts of it by your own (docs/own-code.md): functions, classes,
    modules, tensors or data sets, defined anywhere, also in a notebook. `fields` are
    further fields of the recipe (`epochs=3`, `optimizer__lr=0.1`, or `lr` for short)
    and of the placement (`workers=2`). The first worker calls the methods of
    `callbacks` (docs/own-code.md). Each of `trackers`, a callable or its name
    `"module:function"`, gets the records of metrics.jsonl (docs/tracking.md). Progress
    and warnings go to the logger `samestep`, which prints on stderr unless logging is
    configured; on a terminal there is also a live table. A `SilentView` of
    `samestep.output.console` as `view` turns off both. A `server` that is running saves
    the two seconds of importing torch; `wall_seconds` counts from `started`, a
    time.monotonic().

    Raises a UsageError before anything is started, a TrainingError after, and
    Interrupted after a signal. No process is left.
    """
    started = time.monotonic() if started is None else started
    parts, sections = split_parts(model, data, loss, optimizer, schedule)
    changed, placed = split_fields(batch_of(recipe, data) | fields | sections)
    placement = placement_of(placement, placed)
    with (
        given_or_new(server) as running,
        packed(parts | numbered(callbacks)) as (every, given),
    ):
        names, observers = _checked_apart(every)
        trackers = loaded(trackers)
        recipe, placement, why, notice = resolved(
            recipe_of(recipe, names, changed), placement, names, running.gpus
        )
        with (
            RunWriter.create(Settings.of(recipe, placement), started) as writer,
            _observed(writer, recipe, view, trackers) as shown,
        ):
            shown.note(_headline(recipe, why))
            facts, conditions = described(recipe)
            writer.start("started", facts, running.device(placement.device))
            session = Session(writer, recipe, placement, shown, conditions)
            record = supervise(session, running, given, notice, callbacks=observers)
            return Run(record.path, record.result)


def resume(
    run: Run | str | Path,
    placement: Placement | None = None,
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
    allow_different_numerics: bool = False,
    model: Part | None = None,
    data: Part | None = None,
    loss: Part | None = None,
    optimizer: Part | None = None,
    schedule: Part | None = None,
    callbacks: Iterable[Part] = (),
    trackers: Iterable[Tracker | str] = (),
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
    **placed: Any,
) -> Run:
    """Continue a run from its newest checkpoint, with any workers and exchange.

    The final weights are those of the uninterrupted training. `epochs` or
    `max_steps` is the new total, for a run whose schedule does not depend on it; the
    end of fewer steps is taken back, up to the checkpoint before. A recipe, torch
    version, processor, user code or other condition of the numerics that differs from
    the checkpoint's is refused, unless `allow_different_numerics`. Objects that were
    given to `train` must be given again. `placed` are fields of the placement
    (`workers=2`). Raises like `train`, RunError and CheckpointError.
    """
    started = time.monotonic() if started is None else started
    parts, _ = split_parts(model, data, loss, optimizer, schedule)
    is_allowed = allow_different_numerics or _is_allowed_by_old_name(placed)
    placement = placement_of(placement, placed)
    path = run.path if isinstance(run, Run) else Path(run)
    with (
        given_or_new(server) as running,
        packed(parts | numbered(callbacks)) as (every, given),
    ):
        names, observers = _checked_apart(every)
        trackers = loaded(trackers)
        start = find_start(path, epochs, names, max_steps)
        _, placement, why, notice = resolved(
            start.recipe, _with_own_ledger(placement, start), names, running.gpus
        )
        settings = Settings.of(start.recipe, placement)
        with (
            RunWriter.reopen(path, settings, started) as writer,
            _observed(writer, start.recipe, view, trackers) as shown,
        ):
            # Again: another process may have written before the lock was held.
            start = find_start(path, epochs, names, max_steps)
            facts, conditions = described(start.recipe)
            build = build_of(running, placement.device, placement.max_restarts)
            warnings = [] if is_allowed else start.check(build | conditions)
            _announce(shown, start, why, warnings)
            _reopen(writer, start, facts, running.device(placement.device))
            session = Session(writer, start.recipe, placement, shown, conditions)
            going_on = start.checkpoint, {} if is_allowed else start.kept
            record = supervise(session, running, given, notice, *going_on, observers)
            return Run(record.path, record.result)


def _with_own_ledger(placement: Placement, start: Start) -> Placement:
    has_micro_batches = (start.run / MICRO_BATCHES).exists()
    return with_ledger(placement, start.run, start.step, has_micro_batches)


def with_ledger(
    placement: Placement, run: Path, step: int, has_micro_batches: bool
) -> Placement:
    """Return the placement with the ledger of a run that goes on after `step`.

    It would lack steps if it began, or went on, later. Raises RunError.
    """
    if has_micro_batches:
        return placement.model_copy(update={"ledger": "micro-batches"})
    if placement.ledger == "micro-batches" and step:
        raise RunError(
            f"A ledger of micro-batches begins with the first step; {run} goes on "
            f"after step {step} and has none. Leave out `--ledger micro-batches`, or "
            "train a new run."
        )
    return placement


def _checked_apart(every: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the references of parts and those of callbacks. Raises OwnCodeError."""
    names, observers = apart(every)
    check_callbacks(observers)
    return names, observers


def _is_allowed_by_old_name(placed: dict[str, Any]) -> bool:
    if "accept_other_bits" not in placed:
        return False
    warn_old_name("accept_other_bits", "allow_different_numerics")
    return bool(placed.pop("accept_other_bits"))


def _announce(view: View, start: Start, why: str, warnings: Sequence[str]) -> None:
    view.note(_headline(start.recipe, why))
    for warning in [*start.warnings, *warnings]:
        view.warn(warning)
    view.note(start.headline)


def _reopen(writer: RunWriter, start: Start, facts: JsonObject, device: str) -> None:
    """Take back what was recorded after the checkpoint, and begin to write."""
    start.forget_end()
    writer.rewind(start.step, start.epochs)
    writer.start("resumed", facts, device)


def described(recipe: Recipe) -> tuple[JsonObject, dict[str, str]]:
    """Return the facts on data and code for the run's record, and what a resume needs.

    The latter are the conditions that must be the same to continue the run.
    """
    facts, code = source_of(recipe.data).describe(), checksums(recipe)
    conditions = data_checksums(facts) | bf16.conditions(recipe)
    if recipe.is_portable:
        conditions["arithmetic"] = ARITHMETIC
    return facts | code, code | conditions


def loaded(trackers: Iterable[Tracker | str]) -> list[Tracker]:
    """Return the trackers, those that are named imported. Raises UsageError."""
    return [load(t, "tracker") if isinstance(t, str) else t for t in trackers]


@contextmanager
def _observed(
    writer: RunWriter,
    recipe: Recipe,
    view: View | None,
    trackers: Iterable[Tracker],
) -> Iterator[View]:
    """Show a training and call its trackers; yield the view."""
    with (
        shown_on_stderr(),
        view or make_view(recipe) as shown,
        tracking(writer, shown, trackers),
    ):
        yield shown


def tracking(writer: RunWriter, view: View, trackers: Iterable[Tracker]) -> Tracking:
    """Attach the trackers, and TensorBoard's, to the run's writer; return them."""
    if writer.settings.placement["tensorboard"]:
        trackers = [TensorBoard(writer.path / "tensorboard"), *trackers]
    tracking = Tracking(trackers, view.warn)
    writer.on_record = tracking.send
    return tracking


def _headline(recipe: Recipe, why: str) -> str:
    threads = "1 thread" if recipe.threads == 1 else f"{recipe.threads} threads"
    return f"{recipe.name}: {why}, {threads} each"
