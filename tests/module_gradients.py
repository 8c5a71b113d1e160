"""Gradients of any module, computed by kernels and by float64."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.core import tree
from samestep.kernels.execution import Execution
from samestep.kernels.interface import OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.values import (
    LossOp,
)
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


LOSS = LossOp(OpKind.CROSS_ENTROPY, smoothing=0.1)


def by_kernels(
    model: nn.Module, inputs: Tensor, labels: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """Return the gradients of the summed loss over micro-batches of these sizes."""
    flat = Flat(model)
    vector, slot = torch.zeros(flat.size), torch.zeros(flat.size + flat.tail)
    flat.bind(vector, write=True)
    program = lower(model, inputs.shape[1:], places_of(flat), LOSS)
    count = len(sizes)
    execution = Execution(program, load_kernels(), len(inputs), count)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    merges = [tree.num_merges(m, (0, count), count) for m in range(count)]
    execution.bind_micro_batches(starts, torch.tensor(merges))
    execution.bind_slots([slot], flat.size)
    flattened = inputs.flatten(1).contiguous()
    execution.bind(parameters=vector, running=flat.saved_buffers(), inputs=flattened)
    execution.labels[: len(labels)] = labels.numpy()
    execution.call.weight = 1.0
    execution.run()
    return flat.views(slot)


def by_torch(
    model: nn.Module, inputs: Tensor, labels: Tensor, sizes: list[int]
) -> list[Tensor]:
    """Return the same gradients by autograd, in the model's precision."""
    parts = zip(torch.split(inputs, sizes), torch.split(labels, sizes), strict=True)
    losses = [
        functional.cross_entropy(model(x), y, reduction="sum", label_smoothing=0.1)
        for x, y in parts
    ]
    loss = torch.stack(losses).sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check(
    model: nn.Module,
    input_shape: Sequence[int],
    sizes: list[int],
    tolerance: float = 1e-5,
) -> None:
    """Compare the gradients of a classifier's cross-entropy with those of float64."""
    torch.manual_seed(1)
    inputs = torch.randn(sum(sizes), *input_shape)
    exact = deepcopy(model).double()
    with torch.no_grad():
        classes = model(inputs[:1]).shape[-1]
    labels = torch.randint(classes, (len(inputs),))
    expected = by_torch(exact, inputs.double(), labels, sizes)
    found = by_kernels(model, inputs, labels, sizes)
    for (name, _), gradient, reference in zip(
        model.named_parameters(), found, expected, strict=True
    ):
        error = (gradient - reference).norm()
        assert error <= tolerance * reference.norm() + 1e-6, (name, error)
