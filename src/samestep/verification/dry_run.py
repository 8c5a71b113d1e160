"""A dry run: passes over a few samples before the training, on a copy of the model.

It finds what would fail later with an error that names neither layer nor function.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from samestep.config.model import CnnModel, ModelRecipe, VitModel
from samestep.config.recipe import Recipe
from samestep.core.metric import Metric
from samestep.core.plan import Plan
from samestep.data import pytree
from samestep.data.dataset import Dataset
from samestep.data.pytree import Nested
from samestep.data.splits import Split
from samestep.errors import OwnCodeError, RecipeError
from samestep.models.objective import Objective
from samestep.state import dtypes
from samestep.state.flat import COUNTER, can_count
from samestep.user_code import references, seeding
from samestep.verification import loss_reduction


HOW_CALLED = (
    " A sample that is a dictionary gives the model keyword arguments, a tuple "
    "positional ones."
)
MAX_COMPARED = 8
"""Samples whose losses are compared, to tell a mean from a sum."""


@dataclass(frozen=True)
class Findings:
    """What only a pass through the model can show."""

    constant_buffers: frozenset[str] = frozenset()
    """Buffers that a forward pass in training does not change."""
    metrics: tuple[Metric, ...] = ()
    """The metrics of the loss function, if it is the user's own."""
    unused: tuple[str, ...] = ()
    """Trained parameters that had no gradient."""


def run(
    recipe: Recipe, data: Dataset, model: nn.Module, loss: Callable[..., Any] | None
) -> Findings:
    """Run one pass in training and one in evaluation; the model stays unchanged.

    `loss` is None for a built-in loss. Raises RecipeError, OwnCodeError.
    """
    _check_task(recipe, data)
    train = data.splits["train"]
    samples = torch.arange(min(2, len(train)))
    seeding.seed(0)
    inputs, targets = train.gather(samples)
    copied = copy.deepcopy(model)
    before = {name: buffer.clone() for name, buffer in copied.named_buffers()}
    model_name, loss_name = _names(recipe)
    dtype = dtypes.of(recipe.precision)
    with dtypes.default(dtype):
        outputs = _call(copied, inputs, model_name)
    if loss is None:
        _check_outputs(outputs, targets, data, model_name)
    objective = Objective(copied, recipe.loss, loss)
    with references.blaming(loss_name), dtypes.default(dtype):
        total, _ = objective.measure(outputs, targets)
        if not total.requires_grad:
            raise OwnCodeError(
                f"A loss must depend on the parameters, and that of {loss_name} has no "
                "gradient: is something detached, or turned into a number?"
            )
        torch.autograd.backward(total)
    check_gradients((p for p in copied.parameters() if p.requires_grad), model_name)
    parameters = copied.named_parameters()
    unused = [name for name, p in parameters if p.requires_grad and p.grad is None]
    constant = constant_buffers(copied, before, model_name)
    if any(len(data.splits[name]) for name in ("validation", "test")):
        with torch.no_grad(), dtypes.default(dtype):
            results = _call(copied.eval(), inputs, f"{model_name} in evaluation mode")
            with references.blaming(f"{loss_name} in evaluation"):
                objective.measure(results, targets)
    if loss is not None:
        with dtypes.default(dtype):
            _check_reduction(objective, (inputs, targets, outputs), train, loss_name)
    return Findings(constant, objective.metrics or (), tuple(unused))


def _names(recipe: Recipe) -> tuple[str, str]:
    """Return the names of the model and the loss in messages."""
    names = references.names(recipe)
    model_name = loss_name = "the model"
    if "model" in names:
        model_name = loss_name = references.title(names["model"], "model")
    if "loss" in names:
        loss_name = references.title(names["loss"], "loss")
    return model_name, loss_name


def check_family(recipe: ModelRecipe, data: Dataset) -> None:
    """Raise RecipeError if a built-in family does not take such samples."""
    takes_tokens = recipe.family in ("rnn", "transformer")
    takes_images = recipe.family in ("cnn", "resnet", "rnn", "vit")
    if recipe.family in ("mlp", "custom"):
        return
    if takes_tokens and data.task == "next-token":
        return
    if takes_images and data.task != "next-token" and len(data.input_shape) == 3:
        _check_size(recipe, data)
        return
    accepted = []
    if takes_images:
        accepted.append("images [channels, height, width]")
    if takes_tokens:
        accepted.append("tokens [t]")
    raise RecipeError(
        f"The family `{recipe.family}` takes {' or '.join(accepted)}; a sample of "
        f"these data, for {data.task}, is {list(data.input_shape)}. Use another "
        "`model.family`, such as `mlp`."
    )


def _check_size(recipe: ModelRecipe, data: Dataset) -> None:
    """Raise RecipeError if images are smaller than a kernel or a patch."""
    left = min(data.input_shape[1:])
    least = recipe.patch if isinstance(recipe, VitModel) else 1
    for kernel in recipe.kernels if isinstance(recipe, CnnModel) else ():
        left = (left - kernel + 1) // 2
    if left < least:
        raise RecipeError(
            f"Images of {' x '.join(map(str, data.input_shape[1:]))} are too small for "
            f"`{recipe.family}` with these `kernels` or this `patch`. Use fewer or "
            "smaller ones."
        )


def _check_task(recipe: Recipe, data: Dataset) -> None:
    """Raise RecipeError if the loss is for another task."""
    wanted = "squared-error" if data.task == "regression" else "cross-entropy"
    if recipe.loss.name not in (wanted, "custom"):
        raise RecipeError(
            f"By their targets, these data are for {data.task}, whose loss is "
            f"`{wanted}` or your own; the recipe has `{recipe.loss.name}`. Use "
            f"`--loss {wanted}`, or set `data.task`."
        )


def check_norms(recipe: Recipe, data: Dataset, plan: Plan, model: nn.Module) -> None:
    """Raise RecipeError if BatchNorm would get one value per channel."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    steps = {0, max(0, plan.steps_per_epoch - 1)}
    sizes = [size for step in steps for size in plan.micro_batch_sizes(step) if size]
    if min(sizes) > 1:
        return
    inputs, _ = data.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    try:
        with dtypes.default(dtypes.of(recipe.precision)):
            pytree.call(copy.deepcopy(model), inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RecipeError(
            "BatchNorm needs at least 2 values per channel, and this recipe has "
            f"micro-batches of one sample: the global batches of {recipe.global_batch} "
            f"(the last of an epoch: {plan.batch_size(max(steps))}) are "
            f"cut into {recipe.micro_batches}. Use fewer `micro_batches`, or another "
            "norm."
        ) from None


def _call(model: nn.Module, inputs: Nested, model_name: str) -> Any:
    """Return the outputs of a model.

    Raises OwnCodeError, which names the innermost layer and what it received.
    """
    active: list[str] = []

    def enter(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        shapes = [list(each.shape) for each in given if isinstance(each, Tensor)]
        kind = str(layer) if not list(layer.children()) else type(layer).__name__
        received = " and ".join(map(str, shapes)) or "no tensor"
        active.append(f"layer `{name}`, {kind}, which received {received}")

    for name, layer in model.named_modules():
        if name:
            layer.register_forward_pre_hook(
                lambda layer, given, name=name: enter(name, layer, given)
            )
            layer.register_forward_hook(lambda *_: active.pop() and None)
    try:
        return pytree.call(model, inputs)
    except Exception as error:
        layer_name = f" in {active[-1]}" if active else ""
        is_call = not active and isinstance(error, TypeError)
        hint = HOW_CALLED if is_call and not isinstance(inputs, Tensor) else ""
        raise OwnCodeError(
            f"{references.capital(model_name)} fails on training samples of shape "
            f"{pytree.describe(inputs)}{layer_name}: {type(error).__name__}: {error}."
            f"{hint}"
        ) from error


def _check_outputs(
    outputs: Any, targets: Tensor, data: Dataset, model_name: str
) -> None:
    """Raise OwnCodeError if a built-in loss cannot take the outputs."""
    expected = [*targets.shape]
    if data.task != "regression":
        expected.append(data.outputs)
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else None
    if shape == expected:
        return
    returned = f"an object {type(outputs).__name__}" if shape is None else f"{shape}"
    hint = ""
    if data.task != "regression" and shape and shape[:-1] == expected[:-1]:
        hint = (
            f" The data have {data.outputs} classes or tokens, counted from the labels;"
            " if there are more, set `data.outputs`."
        )
    raise OwnCodeError(
        f"For {data.task}, the outputs for targets {list(targets.shape)} have the "
        f"shape {expected}; {model_name} returned {returned}.{hint}"
    )


def _check_reduction(
    objective: Objective, first: tuple[Any, Any, Any], train: Split, loss_name: str
) -> None:
    """Raise OwnCodeError for a mean over samples; leave the model in evaluation.

    Pairs of samples are tried until one decides.
    """
    objective.model.eval()
    later = range(2, min(MAX_COMPARED, len(train)) - 1, 2)
    pairs = (train.gather(torch.arange(sample, sample + 2)) for sample in later)
    inputs, targets, outputs = first
    losses = [_loss_of(objective, inputs, targets, outputs)]
    if loss_reduction.is_mean(
        chain(losses, (_loss_of(objective, *pair) for pair in pairs))
    ):
        raise OwnCodeError(
            "A loss function returns the sum over its samples, which is divided by the "
            f"size of the whole global batch; {loss_name} returns their mean. Use "
            '`reduction="sum"`, or multiply by `len(targets)`. To divide by a count of '
            "your own, such as that of valid targets, return `(sum, count)`."
        )


def _loss_of(
    objective: Objective, inputs: Any, targets: Any, outputs: Any = None
) -> Callable[[list[int]], float]:
    """Return a function that gives the loss of some rows of a batch.

    It takes these rows of the outputs; if the outputs have no rows, or there are none,
    it computes them from the rows of the inputs, in evaluation.
    """
    are_rows = outputs is not None and loss_reduction.has_rows(outputs, len(targets))

    def loss(rows: list[int]) -> float:
        seeding.seed(0)
        if are_rows:
            selected = loss_reduction.pick(outputs, rows)
        else:
            selected = pytree.call(objective.model, loss_reduction.pick(inputs, rows))
        total, _ = objective.measure(selected, loss_reduction.pick(targets, rows))
        return total.item()

    return loss


def check_gradients(parameters: Iterable[Tensor], model_name: str) -> None:
    """Raise OwnCodeError if none of the trained parameters has a gradient."""
    if all(parameter.grad is None for parameter in parameters):
        raise OwnCodeError(
            "A backward pass must reach the parameters that are trained; of "
            f"{model_name}, none has a gradient. Call `backward` on a loss that "
            "depends on them."
        )


def constant_buffers(
    model: nn.Module, before: dict[str, Tensor], model_name: str
) -> frozenset[str]:
    """Return the names of the buffers that a pass has not changed since `before`.

    Raises OwnCodeError for buffers that it has changed and must not.
    """
    state = model.state_dict(keep_vars=True)
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    constant = set()
    for name, buffer in model.named_buffers():
        if torch.equal(buffer, before[name]):
            constant.add(name)
            continue
        counts = can_count(name, buffer) and (
            name.endswith(COUNTER) or int(buffer - before[name]) == 1
        )
        if name in state and (buffer.dtype == dtype or counts):
            continue
        raise OwnCodeError(
            f"What a forward pass changes must be a persistent {dtypes.NAMES[dtype]} "
            "buffer, like the parameters, so that it can be averaged over "
            "micro-batches, or an integer that grows by 1 in each pass; "
            f"`{name}` of {model_name} is {buffer.dtype}"
            + ("." if name in state else ", and not persistent.")
        )
    return frozenset(constant)
