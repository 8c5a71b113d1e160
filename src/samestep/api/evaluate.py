"""Evaluates the weights of a run or of a model file, for `samestep.evaluate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samestep.api.run import Run
from samestep.config import portable
from samestep.config.placement import Placement
from samestep.data.sources import source_of
from samestep.errors import RunError
from samestep.messages.job import EvaluationJob
from samestep.messages.training import Evaluated, Message
from samestep.output.logs import temporary_logs
from samestep.output.run import read_recipe
from samestep.supervisor.forkserver_client import ForkServer, given_or_new
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import run_workers
from samestep.system.signals import Stop
from samestep.user_code.arguments import Part, packed, placement_of, recipe_of
from samestep.user_code.references import check_trusted


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
        given_or_new(server) as running,
        packed({"model": model, "data": data, "loss": loss}) as (names, given),
        temporary_logs() as logs,
    ):
        resolved, _ = placement_of(placement, placed).resolve(None, running.gpus)
        recipe = recipe_of(read_recipe(model_file), names, {})
        check_trusted(recipe, names)
        portable.check_device(recipe, resolved.device)
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
