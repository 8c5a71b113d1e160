"""A whole training as a program file, which the runner in C repeats without Python.

It has one worker, which owns every micro-batch. The runner prints the fingerprint that
samestep gives the same recipe, on any processor.
"""

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from samestep.config.model import LossRecipe
from samestep.config.recipe import Recipe
from samestep.core import tree
from samestep.core.lr_schedule import rate_of
from samestep.core.plan import Plan, derive_seed
from samestep.data.dataset import Dataset
from samestep.errors import RecipeError
from samestep.kernels.program import PANEL
from samestep.kernels.program_file import (
    OPTIMIZER,
    Averaging,
    ProgramFile,
    Source,
    buffers_of,
    step_type,
)
from samestep.models.objective import Objective, ignored_label
from samestep.optim.param_groups import slices
from samestep.portable.inputs import inputs_of, num_counted
from samestep.portable.optimizer import numbers
from samestep.portable.passes import places_of, training_program
from samestep.state.fingerprint import raw_bytes
from samestep.state.flat import Flat
from samestep.state.layout import AVERAGE


def training_file(
    recipe: Recipe,
    model: nn.Module,
    data: Dataset,
    plan: Plan,
    flat: Flat,
) -> ProgramFile:
    """Return the training of a model that has its initial weights.

    Raises RecipeError for what the runner does not know: several inputs, early
    stopping, augmentation, losses of the user's own.
    """
    _check(recipe, data, plan)
    program = training_program(Objective(model, recipe.loss), data, flat)
    source = inputs_of(data, "train", in_training=True)
    if source is not None:
        rows, program = source.rows, source.adapted(program)
        members = np.arange(len(rows.targets)) if rows.members is None else rows.members
        samples = rows.values.reshape(len(rows.values), -1)
        targets = rows.targets
    else:
        everything = torch.arange(len(data.splits["train"]))
        inputs, drawn = data.splits["train"].gather(everything)
        samples, targets = inputs.flatten(1).numpy(), drawn.contiguous().numpy()
        members = everything.numpy()
    capacity = -(-plan.global_batch // PANEL) * PANEL
    vector = torch.zeros(flat.size)
    flat.bind(vector, write=True)
    groups = slices(recipe.optimizer, flat.layout, (0, flat.size))
    leaves = range(plan.micro_batches)
    merges = [tree.num_merges(m, (0, len(leaves)), len(leaves)) for m in leaves]
    steps = np.zeros(
        recipe.num_steps(plan.steps_per_epoch),
        step_type(plan.micro_batches, capacity, len(groups)),
    )
    for number, step in enumerate(steps):
        _fill_samples(step, plan, number, members, data.targets_per_sample)
        step["factor"] = _factor(step, targets, recipe.loss) if data.own_metrics else 1
        _fill_average(step, recipe, number)
        lr = rate_of(recipe, number, plan.steps_per_epoch)
        ways = [numbers(recipe.optimizer, g.group, lr, number + 1) for g in groups]
        step["optimizers"] = np.frombuffer(b"".join(map(bytes, ways)), OPTIMIZER)
    pieces, text = _pieces(model, flat, plan, recipe)
    return ProgramFile(
        **buffers_of(program, capacity, plan.micro_batches),
        capacity=capacity,
        tail=flat.size,
        merges=np.array(merges),
        parameters=vector.numpy(),
        running=flat.saved_buffers().numpy(),
        data=samples,
        targets=targets,
        groups=np.array([[g.first, g.end - g.first] for g in groups]),
        pieces=pieces,
        text=text,
        steps=steps,
    )


def _check(recipe: Recipe, data: Dataset, plan: Plan) -> None:
    unknown = {
        "a stream": None if plan.steps_per_epoch else True,
        "several inputs": None if data.has_one_input else data.inputs,
        "`early_stopping`": recipe.early_stopping,
        "`schedule.metric`": getattr(recipe.schedule, "metric", None),
        "`data.augment`": getattr(recipe.data, "augment", None),
        "`loss.function`": getattr(recipe.loss, "function", None),
    }
    names = [name for name, value in unknown.items() if value is not None]
    if names:
        raise RecipeError(
            f"A program file cannot have {', '.join(names)}: train with samestep, or "
            "leave that out."
        )


def _fill_samples(
    step: np.void,
    plan: Plan,
    number: int,
    members: NDArray[np.int64],
    per_sample: int,
) -> None:
    first, end = plan.bounds(number)
    size, order = end - first, plan.order(plan.place(number)[0]).numpy()[first:end]
    step["samples"], step["weight"] = size, 1 / (size * per_sample)
    step["starts"] = [*accumulate(plan.micro_batch_sizes(number), initial=0)]
    step["indices"][:size] = members[order]
    step["keys"] = [
        derive_seed(plan.seed, "step", number, m) for m in range(plan.micro_batches)
    ]


def _factor(step: np.void, targets: NDArray[Any], loss: LossRecipe) -> float:
    """Return what makes a mean over all targets one over those that count."""
    chosen = targets[step["indices"][: step["samples"]]]
    counted = num_counted(chosen, ignored_label(loss))
    return chosen.size / counted if counted else 0.0


def _fill_average(step: np.void, recipe: Recipe, number: int) -> None:
    step["max_norm"] = recipe.optimizer.max_grad_norm or 0
    if recipe.ema:
        step["average"] = Averaging.MOVES if number else Averaging.BEGINS
        step["average_weight"] = 1 - recipe.ema.decay


def _pieces(
    model: nn.Module, flat: Flat, plan: Plan, recipe: Recipe
) -> tuple[NDArray[np.int64], bytes]:
    """Return what the fingerprint consists of; see `state.fingerprint`."""
    places, text = places_of(flat), b""
    weights = Source.AVERAGE if AVERAGE in flat.layout.states else Source.PARAMETERS
    steps = range(recipe.num_steps(plan.steps_per_epoch))
    updates = sum(plan.num_pieces(step) for step in steps)
    pieces: list[list[int]] = []
    for name, tensor in model.state_dict().items():
        first = flat.layout.aliases.get(name, name)
        kind = str(tensor.dtype).removeprefix("torch.")
        added = f"{name}{kind}{','.join(map(str, tensor.shape))}".encode()
        if first in flat.layout.counters:
            added += raw_bytes(tensor + updates)
        elif first in flat.layout.constants:
            added += raw_bytes(tensor)
        pieces.append([Source.TEXT, len(text), len(added)])
        text += added
        if first in places.parameters:
            pieces.append([weights, places.parameters[first], tensor.numel()])
        elif first in places.buffers:
            pieces.append([Source.RUNNING, places.buffers[first], tensor.numel()])
    return np.array(pieces), text
