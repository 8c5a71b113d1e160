"""How far the gradients of a recorded program, and PyTorch's, are from float64."""

import copy

import torch
from torch import Tensor

from samestep.config.recipe import Recipe
from samestep.data.prefetch import MicroBatches
from samestep.kernels.library import load_kernels
from samestep.models.device import Device
from samestep.portable.passes import training_program
from samestep.training.components import Components, load_and_build
from samestep.user_code.references import UserCode
from samestep.verification.beside_torch import BesideTorch


LEAST = 1e-3
"""Errors of smaller gradients are relative to this part of the whole gradient."""


def errors(recipe: Recipe) -> tuple[float, float]:
    """Return the largest error of a parameter's gradient: the program's, PyTorch's.

    Relative to the L2 norm of that gradient, in the first micro-batch. Raises
    NotPortable.
    """
    parts = load_and_build(recipe, UserCode(), None, Device())
    beside = _beside(parts)
    batch = MicroBatches(parts.data, parts.plan, has_user_code=True).draw(0, 0)
    ours, _ = beside.recorded(*batch)
    torchs, _ = beside.eager(beside.objective, *batch)
    exact, _ = beside.eager(copy.deepcopy(beside.objective).double(), *batch)
    return _largest(ours, exact), _largest(torchs, exact)


def _beside(parts: Components) -> BesideTorch:
    vector = torch.zeros(parts.flat.size)
    parts.flat.bind(vector, write=True)
    objective = parts.objective()
    program = training_program(objective, parts.data, parts.flat)
    return BesideTorch(program, objective, parts.flat, vector, load_kernels(), 7)


def _largest(found: list[Tensor], exact: list[Tensor]) -> float:
    whole = torch.stack([g.norm() for g in exact]).norm()
    return max(
        float((a - b).norm() / b.norm().clamp_min(LEAST * whole))
        for a, b in zip(found, exact, strict=True)
    )
