"""One pass over two samples before the training, on a copy of the model.

It finds what would fail later with an error that names neither layer nor function.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
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
MOST_COMPARED = 8
"""Samples whose losses are looked at, to tell a mean from a sum."""


@dataclass(frozen=True)
class Findings:
    """What only a pass can show."""

    still: frozenset[str] = frozenset()
    """Buffers that a forward pass in training does not change."""
    metrics: tuple[Metric, ...] = ()
    """What the loss function measures, if it is the user's own."""
    unused: tuple[str, ...] = ()
    """Trained parameters that had no gradient."""


def rehearse(
    recipe: Recipe, data: Dataset, model: nn.Module, loss: Callable[..., Any] | None
) -> Findings:
    """Raises OwnCodeError; the model stays as it is."""
    _check_task(recipe, data)
    train = data.splits["train"]
    samples = torch.arange(min(2, len(train)))
    seeding.seed(0)
    inputs, targets = train.gather(samples)
    twin = copy.deepcopy(model)
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    names = references.names(recipe)
    who = references.title(names["model"], "model") if "model" in names else "the model"
    dtype = dtypes.of(recipe.precision)
    with _naming_layers(twin, who, inputs), dtypes.default(dtype):
        outputs = pytree.call(twin, inputs)
    if loss is None:
        _check_outputs(outputs, targets, data, who)
    objective = Objective(twin, recipe.loss, loss)
    blamed = references.title(names["loss"], "loss") if "loss" in names else who
    with references.blaming(blamed), dtypes.default(dtype):
        total, _ = objective.measure(outputs, targets)
        _check_loss(total, blamed)
        torch.autograd.backward(total)
    check_gradients(twin, who)
    unused = tuple(_without_gradient(twin))
    still = still_buffers(twin, before, who)
    if any(len(data.splits.get(name, ())) for name in ("validation", "test")):
        _evaluate(twin.eval(), objective, inputs, targets, who, blamed)
    if loss is not None:
        with dtypes.default(dtype):
            _check_reduction(objective, (inputs, targets, outputs), train, blamed)
    return Findings(still, objective.metrics or (), unused)


def _evaluate(
    twin: nn.Module,
    objective: Objective,
    inputs: Nested,
    targets: Tensor,
    who: str,
    blamed: str,
) -> None:
    """The same samples in evaluation mode. Raises OwnCodeError."""
    dtype = next(twin.parameters()).dtype
    with torch.no_grad(), dtypes.default(dtype):
        with _naming_layers(twin, f"{who} in evaluation mode", inputs):
            outputs = pytree.call(twin, inputs)
        with references.blaming(f"{blamed} in evaluation"):
            objective.measure(outputs, targets)


def check_family(recipe: ModelRecipe, data: Dataset) -> None:
    """Raises RecipeError if a built-in family does not take such samples."""
    takes_tokens = recipe.family in ("rnn", "transformer")
    takes_images = recipe.family in ("cnn", "resnet", "rnn", "vit")
    if recipe.family in ("mlp", "custom"):
        return
    if takes_tokens and data.task == "next-token":
        return
    if takes_images and data.task != "next-token" and len(data.input_shape) == 3:
        _check_size(recipe, data)
        return
    wanted = "images [channels, height, width]" * takes_images
    wanted += " or " * (takes_images and takes_tokens) + "tokens [t]" * takes_tokens
    raise RecipeError(
        f"The family `{recipe.family}` takes {wanted}; a sample of these data, for "
        f"{data.task}, is {list(data.input_shape)}. Use another `model.family`, such "
        "as `mlp`."
    )


def _check_size(recipe: ModelRecipe, data: Dataset) -> None:
    """Raises RecipeError where an image is smaller than what a layer looks at."""
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
    """Raises RecipeError if the loss is that of other tasks."""
    wanted = "squared-error" if data.task == "regression" else "cross-entropy"
    if recipe.loss.name not in (wanted, "custom"):
        raise RecipeError(
            f"The loss of {data.task}, which these data are for by their targets, is "
            f"`{wanted}` or your own; the recipe has `{recipe.loss.name}`. Use "
            f"`--loss {wanted}`, or say `data.task`."
        )


def check_norms(recipe: Recipe, data: Dataset, plan: Plan, model: nn.Module) -> None:
    """Raises RecipeError if BatchNorm would get one value per channel."""
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return
    steps = {0, plan.steps_per_epoch - 1}
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
            f"(the last of an epoch: {plan.batch_size(plan.steps_per_epoch - 1)}) are "
            f"cut into {recipe.micro_batches}. Use fewer `micro_batches`, or another "
            "norm."
        ) from None


@contextlib.contextmanager
def _naming_layers(model: nn.Module, who: str, inputs: Nested) -> Iterator[None]:
    """An exception inside is told with the innermost layer and what it received."""
    inside: list[str] = []

    def enter(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        shapes = [list(each.shape) for each in given if isinstance(each, Tensor)]
        kind = str(layer) if not list(layer.children()) else type(layer).__name__
        received = " and ".join(map(str, shapes)) or "no tensor"
        inside.append(f"layer `{name}`, {kind}, which received {received}")

    for name, layer in model.named_modules():
        if name:
            layer.register_forward_pre_hook(
                lambda layer, given, name=name: enter(name, layer, given)
            )
            layer.register_forward_hook(lambda *_: inside.pop() and None)
    try:
        yield
    except Exception as error:
        where = f" in {inside[-1]}" if inside else ""
        how = HOW_CALLED if _is_call(error, inside, inputs) else ""
        raise OwnCodeError(
            f"{references.capital(who)} fails on training samples of shape "
            f"{pytree.describe(inputs)}{where}: {type(error).__name__}: {error}."
            f"{how}"
        ) from error


def _is_call(error: Exception, inside: list[str], inputs: Nested) -> bool:
    """Whether several inputs, perhaps, do not fit the model's parameters."""
    several = not isinstance(inputs, Tensor)
    return several and not inside and isinstance(error, TypeError)


def _check_outputs(outputs: Any, targets: Tensor, data: Dataset, who: str) -> None:
    wanted = [*targets.shape]
    if data.task != "regression":
        wanted.append(data.outputs)
    found = list(outputs.shape) if isinstance(outputs, Tensor) else None
    if found == wanted:
        return
    what = f"{found}" if found is not None else f"an object {type(outputs).__name__}"
    hint = ""
    if data.task != "regression" and found and found[:-1] == wanted[:-1]:
        hint = (
            f" The data have {data.outputs} classes or tokens, counted from the labels;"
            " if there are more, say `data.outputs`."
        )
    raise OwnCodeError(
        f"For {data.task}, the outputs for targets {list(targets.shape)} have the "
        f"shape {wanted}; {who} returned {what}.{hint}"
    )


def _check_loss(loss: Tensor, who: str) -> None:
    if not loss.requires_grad:
        raise OwnCodeError(
            f"A loss must depend on the parameters, and that of {who} has no gradient: "
            "is something detached, or turned into a number?"
        )


def _check_reduction(
    objective: Objective, first: tuple[Any, Any, Any], train: Split, who: str
) -> None:
    """Raises OwnCodeError for a mean over samples; leaves the model in evaluation.

    Pairs of samples are tried until one decides.
    """
    objective.model.eval()
    later = range(2, min(MOST_COMPARED, len(train)) - 1, 2)
    pairs = (train.gather(torch.arange(sample, sample + 2)) for sample in later)
    inputs, targets, outputs = first
    losses = [_loss_of(objective, inputs, targets, outputs)]
    if loss_reduction.is_mean(
        chain(losses, (_loss_of(objective, *pair) for pair in pairs))
    ):
        raise OwnCodeError(
            "A loss function returns the sum over its samples, which is divided by the "
            f"size of the whole global batch; {who} returns their mean. Use "
            '`reduction="sum"`, or multiply by `len(targets)`. To divide by a count of '
            "your own, such as that of valid targets, return `(sum, count)`."
        )


def _loss_of(
    objective: Objective, inputs: Any, targets: Any, outputs: Any = None
) -> Callable[[list[int]], float]:
    """The loss of some rows of a batch.

    By these rows of its outputs; if the outputs have no rows, or there are none, by
    what the model, in evaluation, makes of these samples alone.
    """
    are_rows = outputs is not None and loss_reduction.has_rows(outputs, len(targets))

    def loss(rows: list[int]) -> float:
        seeding.seed(0)
        if are_rows:
            made = loss_reduction.pick(outputs, rows)
        else:
            made = pytree.call(objective.model, loss_reduction.pick(inputs, rows))
        total, _ = objective.measure(made, loss_reduction.pick(targets, rows))
        return total.item()

    return loss


def check_gradients(model: nn.Module, who: str) -> None:
    """Raises OwnCodeError where no trained parameter has one."""
    if all(p.grad is None for p in model.parameters() if p.requires_grad):
        raise OwnCodeError(
            f"A backward pass must reach the parameters that are trained; of {who}, "
            "none has a gradient. Call `backward` on a loss that depends on them."
        )


def _without_gradient(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield name


def still_buffers(
    model: nn.Module, before: dict[str, Tensor], who: str
) -> frozenset[str]:
    """The buffers that did not change. OwnCodeError for others that may not."""
    state = model.state_dict(keep_vars=True)
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    still = set()
    for name, buffer in model.named_buffers():
        if torch.equal(buffer, before[name]):
            still.add(name)
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
            f"`{name}` of {who} is {buffer.dtype}"
            + ("." if name in state else ", and not persistent.")
        )
    return frozenset(still)
