"""The Python API: train and evaluate, from a script, a notebook or the command line."""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.data import mnist
from samestep.errors import RunError, SamestepError
from samestep.launch import ForkServer, run_workers
from samestep.machine import usable_cores
from samestep.placement import Placement
from samestep.recipe import Recipe
from samestep.run import MODEL_FILE, Run, RunWriter, read_recipe
from samestep.view import View, make_view


SPIN_SECONDS = 2e-3
"""How long at most a worker with a core of its own tries before it sleeps: most waits
end sooner, and to be woken takes 30 to 60 us."""
CROWDED_SPIN_SECONDS = 50e-6
"""The same where workers share cores: the awaited worker may need this one."""


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
    TrainingError after; in both cases no process is left.
    """
    started = time.monotonic() if started is None else started
    if server is None:
        with ForkServer() as own:
            return train(recipe, placement, view=view, server=own, started=started)
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    placement, why = (placement or Placement()).resolve(recipe.micro_batches)
    notice = mnist.prepare()
    writer = RunWriter.create(recipe, placement, mnist.describe(), started)
    with view or make_view(recipe) as shown:
        threads = "1 thread" if recipe.threads == 1 else f"{recipe.threads} threads"
        shown.note(f"{recipe.name}: {why}, {threads} each")
        if notice:
            writer.event("notice", text=notice)
            shown.note(f"note: {notice}")
        return _train(writer, server, shown)


def _train(writer: RunWriter, server: ForkServer, view: View) -> Run:
    final: dict[str, Any] = {}

    def listen(message: Mapping[str, Any]) -> None:
        writer.receive(message)
        view.receive(message)
        if message["type"] == "finished":
            final.update({k: message[k] for k in message if k not in ("type", "rank")})

    job = {
        "kind": "train",
        "recipe": writer.recipe.to_dict(),
        "model_file": os.path.abspath(writer.path / MODEL_FILE),  # noqa: PTH100
    }
    job |= _exchange_job(writer.placement)
    assert isinstance(writer.placement.workers, int)
    try:
        run_workers(server, job, writer.placement.workers, writer.logs, listen)
    except SamestepError as error:
        writer.close("failed", error=str(error), failed_rank=error.details.get("rank"))
        raise
    except BaseException:  # Ctrl-C, SIGTERM
        writer.close("interrupted")
        raise
    return writer.close("finished", **final)


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
    workers = resolved.workers
    assert isinstance(workers, int)
    job = {
        "kind": "evaluate",
        "recipe": recipe.to_dict(),
        "model_file": os.path.abspath(model_file),  # noqa: PTH100
        "split": split,
    }
    job |= _exchange_job(resolved)
    reports: list[Mapping[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="samestep-") as logs:
        run_workers(server, job, workers, Path(logs), reports.append)
    report = next(r for r in reports if r["type"] == "evaluated")
    names = Evaluation.__dataclass_fields__
    return Evaluation(**{name: report[name] for name in names})


def _exchange_job(placement: Placement) -> dict[str, Any]:
    """What a worker needs to know to join the exchange."""
    workers, cores = placement.workers, usable_cores()[0]
    assert isinstance(workers, int)
    return {
        "exchange": placement.exchange,
        "hang_timeout": placement.hang_timeout,
        "spin_seconds": SPIN_SECONDS if workers <= cores else CROWDED_SPIN_SECONDS,
    }


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
