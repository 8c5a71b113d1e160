"""What a recipe says to compute: its samples, its model, its loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from samestep import models
from samestep.config.data import MnistData, TextData
from samestep.config.recipe import Recipe
from samestep.core.plan import Plan, derive_seed
from samestep.data import dataset
from samestep.data.prefetch import Drawn, MicroBatches
from samestep.errors import RecipeError
from samestep.models.device import Device
from samestep.models.objective import Objective, built_in
from samestep.optim import averaging
from samestep.optim.optimizer import state_names
from samestep.optim.param_groups import wholes
from samestep.state import dtypes
from samestep.state.flat import Flat
from samestep.system.heartbeat import BUILDING, LOADING
from samestep.training import init_weights
from samestep.user_code import seeding
from samestep.user_code.references import UserCode, find_loss, names
from samestep.verification import dry_run
from samestep.verification.dry_run import Findings
from samestep.verification.probe import Replay


Loss = Callable[..., Any]


class Parts(NamedTuple):
    """What a recipe says to compute."""

    data: dataset.Dataset
    plan: Plan
    model: nn.Module
    loss: Loss | None
    """The loss function if it is the user's own."""
    flat: Flat
    unused: tuple[str, ...]
    """Trained parameters that had no gradient in a rehearsal."""

    def objective(self, recipe: Recipe) -> Objective:
        """Return the model together with its loss."""
        data = self.data
        return Objective(
            *(self.model, recipe.loss, self.loss, data.own_metrics, recipe.precision),
            targets_per_sample=data.tokens_per_sample,
        )

    def replay(
        self, recipe: Recipe, draw: Callable[[int, int], Drawn], device: Device
    ) -> Replay:
        """Return what computes micro-batches outside of the training."""
        return Replay(draw, self.objective(recipe), self.flat, recipe.seed, device)


def load_data(
    recipe: Recipe, own: UserCode, most_steps: int | None = None
) -> tuple[dataset.Dataset, Plan]:
    """The samples, and which of them make up which step.

    At most `most_steps` full global batches, and the last one if it is short; as many
    samples at most of the other splits. Raises DataError, OwnCodeError.
    """
    data = dataset.of_recipe(recipe, own)
    size = len(data.splits["train"])
    if most_steps is not None:
        batch = recipe.global_batch
        size = min(size, most_steps * batch + size % batch)
        data = data.first(size)
    plan = Plan(size, recipe.global_batch, recipe.micro_batches, recipe.seed)
    return data, plan


def _flat(recipe: Recipe, model: nn.Module, still: frozenset[str]) -> Flat:
    """Raises RecipeError."""
    states = (*state_names(recipe.optimizer), *averaging.vectors(recipe))
    named = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    return Flat(model, states, still, wholes(recipe.optimizer, named))


def load_and_build(
    recipe: Recipe,
    own: UserCode,
    most_steps: int | None,
    device: Device,
    enter: Callable[[int], None] = lambda _: None,
) -> Parts:
    """Load the data and build the model; `enter` is called with each phase.

    Raises DataError, RecipeError, OwnCodeError.
    """
    enter(LOADING)
    data, plan = load_data(recipe, own, most_steps)
    enter(BUILDING)
    seeding.seed(derive_seed(recipe.seed, "model"))
    dry_run.check_family(recipe.model, data)
    dtype = dtypes.of(recipe.precision)
    model = models.build(recipe.model, data, own, dtype)
    init_weights.prepare(model, recipe)
    loss, found = find_loss(recipe, own), Findings()
    if not isinstance(recipe.data, MnistData | TextData) or names(recipe):
        found = dry_run.rehearse(recipe, data, model, loss)
        data = replace(data, own_metrics=found.metrics)
    else:
        data = replace(data, own_metrics=built_in(recipe.loss))
    dry_run.check_norms(recipe, data, plan, model)
    _check_stopping(recipe, data)
    flat = _flat(recipe, device.move(model), found.still)
    return Parts(data, plan, model, loss, flat, found.unused)


def _check_stopping(recipe: Recipe, data: dataset.Dataset) -> None:
    """Raises RecipeError if what it looks at is not measured."""
    if recipe.early_stopping is None:
        return
    if not len(data.splits["validation"]):
        raise RecipeError(
            "Early stopping looks at validation samples, and the data hold out none: "
            "hold some out, or leave out `early_stopping`."
        )
    measured = [
        f"validation_{name}" for name in ("loss", *(m.name for m in data.metrics))
    ]
    if recipe.early_stopping.metric not in measured:
        raise RecipeError(
            f"`early_stopping.metric` is what is measured on these data, "
            f"{' or '.join(measured)}; received `{recipe.early_stopping.metric}`."
        )


def load_replay(
    recipe: Recipe, own: UserCode, most_steps: int | None, device: Device
) -> Replay:
    """Load and build what it takes to compute a micro-batch again.

    Raises as `load_and_build` does.
    """
    parts = load_and_build(recipe, own, most_steps, device)
    source = MicroBatches(parts.data, parts.plan, has_own_code=True)
    return parts.replay(recipe, source.draw, device)
