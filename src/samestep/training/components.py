"""What a recipe says to compute: its samples, its model, its loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from samestep import models
from samestep.config.data import MnistData, TextData
from samestep.config.model import LossRecipe, MlpModel
from samestep.config.optimizer import CustomOptimizer
from samestep.config.recipe import Recipe
from samestep.core.lr_schedule import CustomFactor
from samestep.core.plan import Plan, derive_seed
from samestep.data import dataset
from samestep.data.plans import LoaderPlan, StreamPlan
from samestep.data.prefetch import Drawn, MicroBatches
from samestep.data.sources.user_dataset import given_of, samples_of
from samestep.errors import RecipeError, RunError
from samestep.models.device import Device
from samestep.models.objective import Objective, built_in
from samestep.optim import averaging
from samestep.optim.building import Definition, definition, division
from samestep.optim.optimizer import state_names
from samestep.optim.param_groups import unsharded_names
from samestep.portable.initial import from_counters
from samestep.portable.passes import training_program
from samestep.portable.weights import draw_weights
from samestep.state import dtypes
from samestep.state.flat import Flat
from samestep.system.heartbeat import BUILDING, LOADING
from samestep.training import init_weights
from samestep.user_code import seeding
from samestep.user_code.references import UserCode, find_loss, names
from samestep.verification import dry_run, optimizer_trial, replicas, schedule
from samestep.verification.dry_run import Findings
from samestep.verification.probe import Replay


Loss = Callable[..., Any]


@dataclass(frozen=True)
class ModelAndData:
    """What a recipe says to evaluate."""

    recipe: Recipe
    data: dataset.Dataset
    model: nn.Module
    loss: Loss | None
    """The loss function if it is the user's own."""

    def objective(self, loss: LossRecipe | None = None) -> Objective:
        """Return the model together with the recipe's loss, or another `loss`."""
        return Objective(
            self.model,
            loss or self.recipe.loss,
            self.loss,
            self.data.own_metrics,
            self.recipe.precision,
            targets_per_sample=self.data.tokens_per_sample,
        )


@dataclass(frozen=True)
class Components(ModelAndData):
    """What a recipe says to compute."""

    plan: Plan
    flat: Flat
    unused: tuple[str, ...]
    """Trained parameters that had no gradient in the dry run."""
    optimizer: Definition | None = None
    """The optimizer if it is the user's own."""
    factor: CustomFactor | None = None
    """The schedule if it is the user's own."""

    @property
    def num_steps(self) -> int:
        """The optimizer steps of the whole training."""
        return self.recipe.num_steps(self.plan.steps_per_epoch)

    def replay(self, draw: Callable[[int, int], Drawn], device: Device) -> Replay:
        """Return what computes micro-batches outside of the training."""
        # Once: the program stays the same even if the module remembers something later.
        record = cache(self._recorded) if self.recipe.is_portable else None
        return Replay(
            draw, self.objective(), self.flat, self.recipe.seed, device, record
        )

    def _recorded(self) -> str:
        """Return the SHA-256 of the model's program in training, recorded anew."""
        return training_program(self.objective(), self.data, self.flat).sha256


def load_and_build(
    recipe: Recipe,
    user_code: UserCode,
    max_steps: int | None,
    device: Device,
    enter: Callable[[int], None] = lambda _: None,
) -> Components:
    """Load the data and build the model; `enter` is called with each phase.

    Raises DataError, RecipeError, OwnCodeError.
    """
    enter(LOADING)
    data, plan = load_data(recipe, user_code, max_steps)
    enter(BUILDING)
    dry_run.check_family(recipe.model, data)
    model = new_model(recipe, data, user_code)
    init_weights.prepare(model, recipe)
    loss = find_loss(recipe, user_code)
    findings = _dry_run(recipe, data, model, loss)
    data = replace(data, own_metrics=findings.metrics)
    dry_run.check_norms(recipe, data, plan, model)
    _check_validation(recipe, data)
    _check_schedule(recipe, plan)
    # Moved first: the vectors are on the device of the parameters.
    model = device.move(model)
    optimizer = _own_optimizer(recipe, user_code, model)
    flat = _flat(recipe, model, findings.constant_buffers, optimizer)
    factor = schedule.load(recipe, user_code)
    return Components(
        recipe, data, model, loss, plan, flat, findings.unused, optimizer, factor
    )


def load_trained(
    recipe: Recipe,
    user_code: UserCode,
    split: str,
    model_file: Path,
    device: Device,
    enter: Callable[[int], None] = lambda _: None,
) -> ModelAndData:
    """Load the data and the weights of a model file, to evaluate them on a split.

    Raises DataError, OwnCodeError, RunError.
    """
    enter(LOADING)
    data = dataset.of_recipe(recipe, user_code)
    if len(data.splits[split]) == 0:
        raise RunError(f"The recipe {recipe.name} holds out no {split} samples.")
    given = given_of(data.splits[split])
    if split == "train" and given is not None and given.is_stream:
        raise RunError(
            "Splits that are evaluated are kept in memory, and the training samples of "
            f"{recipe.name} are a stream: give it as `test`, too."
        )
    enter(BUILDING)
    model = new_model(recipe, data, user_code)
    replicas.load_into(model, model_file)
    loss = find_loss(recipe, user_code)
    metrics = built_in(recipe.loss)
    if names(recipe):
        metrics = dry_run.run(recipe, data, model, loss).metrics
    data = replace(data, own_metrics=metrics)
    return ModelAndData(recipe, data, device.move(model), loss)


def load_data(
    recipe: Recipe, user_code: UserCode, max_steps: int | None = None
) -> tuple[dataset.Dataset, Plan]:
    """Load the samples, and plan which of them make up which step.

    Loads at most `max_steps` full global batches, and the last one if it is short; as
    many samples at most of the other splits. Raises DataError, OwnCodeError.
    """
    data = dataset.of_recipe(recipe, user_code)
    whole = data.splits["train"]
    size, given = len(whole), given_of(whole)
    if given is not None and given.is_stream:
        return data, StreamPlan.of(recipe, given, samples_of(whole), max_steps)
    if given is not None:
        plan = LoaderPlan.of(recipe, given, max_steps)
        if max_steps is not None:
            data = data.first(plan.num_samples, ("validation", "test"))
        return data, plan
    if max_steps is not None:
        batch = recipe.global_batch
        size = min(size, max_steps * batch + size % batch)
        data = data.first(size)
    plan = Plan(
        size,
        recipe.global_batch,
        recipe.micro_batches,
        recipe.seed,
        recipe.is_portable,
    )
    return data, plan


def new_model(recipe: Recipe, data: dataset.Dataset, user_code: UserCode) -> nn.Module:
    """Build the model with weights drawn from the recipe's seed.

    Raises RecipeError, OwnCodeError.
    """
    seeding.seed(derive_seed(recipe.seed, "model"))
    dtype = dtypes.of(recipe.precision)
    if not recipe.is_portable:
        return models.build(recipe.model, data, user_code, dtype)
    with from_counters(recipe.seed) as building:
        model = models.build(recipe.model, data, user_code, dtype)
    building.check(model)
    if isinstance(recipe.model, MlpModel):
        draw_weights(model, recipe.seed)
    return model


def load_replay(
    recipe: Recipe, user_code: UserCode, max_steps: int | None, device: Device
) -> Replay:
    """Load and build what it takes to compute a micro-batch again.

    Raises as `load_and_build` does.
    """
    components = load_and_build(recipe, user_code, max_steps, device)
    source = MicroBatches(components.data, components.plan, has_user_code=True)
    return components.replay(source.replay, device)


def _dry_run(
    recipe: Recipe, data: dataset.Dataset, model: nn.Module, loss: Loss | None
) -> Findings:
    """Return what a dry run finds, or what is known of built-in data without one."""
    if isinstance(recipe.data, MnistData | TextData) and not names(recipe):
        return Findings(metrics=built_in(recipe.loss))
    return dry_run.run(recipe, data, model, loss)


def _own_optimizer(
    recipe: Recipe, user_code: UserCode, model: nn.Module
) -> Definition | None:
    """Return the user's own optimizer, after a trial. Raises OwnCodeError."""
    if not isinstance(recipe.optimizer, CustomOptimizer):
        return None
    flat = Flat(model, division=division(recipe))
    return optimizer_trial.run(definition(recipe, user_code, flat.layout), flat)


def _flat(
    recipe: Recipe,
    model: nn.Module,
    constant: frozenset[str],
    optimizer: Definition | None,
) -> Flat:
    """Return the vectors of a model. Raises RecipeError."""
    own = optimizer.layout.states if optimizer else state_names(recipe.optimizer)
    states = (*own, *averaging.vectors(recipe))
    shapes = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    unsharded = unsharded_names(recipe.optimizer, shapes)
    return Flat(model, states, constant, unsharded, division(recipe))


def _check_schedule(recipe: Recipe, plan: Plan) -> None:
    """Raise RecipeError if a schedule follows what is not known of a stream."""
    schedule = recipe.schedule
    if plan.steps_per_epoch:
        return
    if schedule.warmup_epochs or getattr(schedule, "every_epochs", None):
        raise RecipeError(
            "How many steps an epoch of a stream has is not known before its end; the "
            f"schedule of this recipe, `{schedule.name}` with {schedule.warmup_epochs} "
            "epochs of warmup, follows it. Use `warmup_steps` and `every_steps`."
        )
    if schedule.depends_on_epochs and recipe.max_steps is None:
        raise RecipeError(
            "How many steps the epochs of a stream have is not known before their end; "
            f"the schedule `{schedule.name}` follows it. Set `max_steps` instead of "
            "`epochs`, or use a constant learning rate."
        )


def _check_validation(recipe: Recipe, data: dataset.Dataset) -> None:
    """Raise RecipeError if something watches what is not measured."""
    for name in recipe.watching_validation:
        if not len(data.splits["validation"]):
            raise RecipeError(
                f"`{name}` is for validation samples, and the data hold out none: hold "
                f"some out, or leave out `{name}`."
            )
    measured = [
        f"validation_{name}" for name in ("loss", *(m.name for m in data.metrics))
    ]
    for name in ("early_stopping", "schedule"):
        watched = getattr(getattr(recipe, name), "metric", None)
        if watched is not None and watched not in measured:
            raise RecipeError(
                f"`{name}.metric` is what is measured on these data, "
                f"{' or '.join(measured)}; received `{watched}`."
            )
