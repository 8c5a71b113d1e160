"""The Python API: train, resume and evaluate, from a script or the command line."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.data import mnist
from samestep.errors import RunError
from samestep.forking import ForkServer
from samestep.jobs import exchange_fields
from samestep.launch import run_workers
from samestep.placement import Placement
from samestep.recipe import Recipe
from samestep.resumption import find_start
from samestep.run import Run, read_recipe
from samestep.session import Session
from samestep.signals import Stop
from samestep.view import View, make_view
from samestep.writer import RunWriter


@dataclass(frozen=True)
class Evaluation:
    """Weights measured on one split; the loss is the mean cross-entropy per sample."""

    accuracy: float
    loss: float
    correct: int
    samples: int
    weights_sha256: str


def train(
    recipe: Recipe | str | Path = "mnist-mlp",
    placement: Placement | None = None,
    *,
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
) -> Run:
    """Train a recipe: a Recipe, the name of a built-in one, or the path of a TOML file.

    The result depends on the recipe alone. Progress goes to stderr unless `view` is a
    `samestep.view.SilentView()`. A `server` that is already running saves the
    two seconds of importing torch; `started` is the time.monotonic() from which
    `wall_seconds` counts. Raises a UsageError before anything is started, a
    TrainingError after, and Interrupted after a signal; no process is left.
    """
    started = time.monotonic() if started is None else started
    if server is None:
        with ForkServer() as own:
            return train(recipe, placement, view=view, server=own, started=started)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    placement, why = (placement or Placement()).resolve(recipe.micro_batches)
    notice = mnist.prepare()
    with (
        RunWriter.create(recipe, placement, started) as writer,
        view or make_view(recipe) as shown,
    ):
        shown.note(_headline(recipe, why))
        writer.start("started", mnist.describe())
        return Session(writer, server, shown).run(notice)


def resume(
    run: Run | str | Path,
    placement: Placement | None = None,
    *,
    epochs: int | None = None,
    accept_other_bits: bool = False,
    view: View | None = None,
    server: ForkServer | None = None,
    started: float | None = None,
) -> Run:
    """Go on with a run from its newest checkpoint, with any workers and exchange.

    The final weights are those of the uninterrupted training. `epochs` extends a run
    whose schedule does not depend on their number. Another recipe, torch version or
    instruction set than the checkpoint's is refused, unless `accept_other_bits`.
    Raises like `train`; RunError and CheckpointError say why it cannot go on.
    """
    started = time.monotonic() if started is None else started
    if server is None:
        with ForkServer() as own:
            return resume(
                run,
                placement,
                epochs=epochs,
                accept_other_bits=accept_other_bits,
                view=view,
                server=own,
                started=started,
            )
    path = run.path if isinstance(run, Run) else Path(run)
    start = find_start(path, epochs)
    placement, why = (placement or Placement()).resolve(start.recipe.micro_batches)
    notice = mnist.prepare()
    with (
        RunWriter.reopen(path, start.recipe, placement, started) as writer,
        view or make_view(start.recipe) as shown,
    ):
        start = find_start(path, epochs)  # nobody else writes any more
        start.check(server.build(), accept_other_bits)
        shown.note(_headline(start.recipe, why))
        for warning in start.warnings:
            shown.note(f"warning: {warning}")
        shown.note(start.headline)
        writer.rewind(start.step, start.epochs)
        writer.start("resumed", mnist.describe())
        return Session(writer, server, shown).run(notice, start.checkpoint)


def evaluate(
    run_or_model: Run | str | Path,
    placement: Placement | None = None,
    *,
    split: str = "test",
    server: ForkServer | None = None,
) -> Evaluation:
    """Measure the weights of a run or of a model file; exact at any number of workers.

    Raises RunError where there are no weights.
    """
    if server is None:
        with ForkServer() as own:
            return evaluate(run_or_model, placement, split=split, server=own)
    model_file = _model_file(run_or_model)
    recipe = read_recipe(model_file)
    resolved = (placement or Placement()).resolve(None)[0]
    job = {
        "kind": "evaluate",
        "recipe": recipe.to_dict(),
        "model_file": os.path.abspath(model_file),  # noqa: PTH100
        "split": split,
        **exchange_fields(resolved),
    }
    reports: list[Mapping[str, Any]] = []
    workers = resolved.num_workers
    with tempfile.TemporaryDirectory(prefix="samestep-") as logs:
        run_workers(server, job, workers, Path(logs), reports.append, Stop())
    report = next(r for r in reports if r["type"] == "evaluated")
    names = Evaluation.__dataclass_fields__
    return Evaluation(**{name: report[name] for name in names})


def _headline(recipe: Recipe, why: str) -> str:
    threads = "1 thread" if recipe.threads == 1 else f"{recipe.threads} threads"
    return f"{recipe.name}: {why}, {threads} each"


def _model_file(run_or_model: Run | str | Path) -> Path:
    if isinstance(run_or_model, Run):
        return run_or_model.model_file
    path = Path(run_or_model)
    if path.is_dir():
        run = Run.open(path)
        run.weights_sha256  # noqa: B018  raises where the run has no final weights
        return run.model_file
    if not path.exists():
        raise RunError(f"There is no run directory or model file {path}.")
    return path
