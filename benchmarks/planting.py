"""Plants one fault in a worker: a library of faults.py, which its fork server imports.

PLANTED in the environment of a worker says which fault, as JSON; without it, or if it
is of another worker, the worker is an ordinary one.
"""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from samestep.core.tree import Range
from samestep.exchange import Summands
from samestep.exchange.autograd import AutogradPasses
from samestep.portable.passes import RecordedPasses
from samestep.portable.pieces import Piece
from samestep.training import train
from samestep.training.trainer import Samples, Trainer


PLANTED = "PLANTED"
BITS = 26
"""The lower bits of a float32 that are flipped: a change by a factor of 16 at most."""


@dataclass(frozen=True)
class Fault:
    """A fault of the worker `rank` in one optimizer step, counted from 1."""

    kind: str
    step: int
    rank: int
    seed: int

    @property
    def text(self) -> str:
        """Return what PLANTED has to be."""
        return json.dumps(vars(self))


class _Now:
    """What the functions that are replaced below must know in the step of the fault."""

    fault: Fault | None = None
    micro_batch = -1
    rng = random.Random(0)  # noqa: S311
    copied: Any = None
    """The samples with the wrong bit, which the kernels read."""


def _is_now(kind: str, micro_batches: Range) -> bool:
    is_kind = _Now.fault is not None and _Now.fault.kind == kind
    return is_kind and micro_batches[0] <= _Now.micro_batch < micro_batches[1]


def _flip(vector: Tensor, place: int) -> None:
    """Flip one bit of a vector [n] at random: of a float, or of an integer its last."""
    if not vector.is_floating_point():
        vector[place] = vector[place] ^ 1
        return
    words = vector.view(torch.int32)
    words[place] = words[place] ^ (1 << _Now.rng.randrange(BITS))


def _place(trainer: Trainer, most_dimensions: int) -> int | None:
    """Return a place in the own slice, in tensors of few dimensions, at random."""
    layout, (first, end) = trainer.replica.flat.layout, trainer.replica.exchange.owned
    parts = [
        range(max(offset, first), min(offset + entry.numel, end))
        for entry, offset in zip(layout.parameters, layout.offsets, strict=False)
        if len(entry.shape) <= most_dimensions
    ]
    parts = [part for part in parts if len(part)]
    if not parts:
        return None
    (part,) = _Now.rng.choices(parts, [len(part) for part in parts])
    return _Now.rng.choice(part) - first


def _in_parameters(trainer: Trainer) -> None:
    place, exchange = _place(trainer, 9), trainer.replica.exchange
    if place is not None:
        _flip(exchange.parameters, place + exchange.owned[0])


def _in_states(trainer: Trainer) -> None:
    place = _place(trainer, 9)
    if place is not None:
        _flip(_Now.rng.choice(trainer.replica.exchange.states), place)


def _in_gradient(trainer: Trainer) -> None:
    """Let the next update begin with a flipped bit of the gradient."""
    replica = trainer.replica
    optimizer, take = replica.optimizer, replica.optimizer.step

    def step(gradient: Tensor | Summands, lr: float) -> None:
        del vars(optimizer)["step"]
        passes = replica.passes
        deferred = passes.weights if isinstance(passes, RecordedPasses) else None
        # Gradients of matrices may be what the update itself computes.
        place = _place(trainer, 1 if deferred and deferred.is_due else 9)
        leaves = [gradient] if isinstance(gradient, Tensor) else gradient.leaves
        if place is not None:
            _flip(_Now.rng.choice(leaves), place)
        take(gradient, lr)

    vars(optimizer)["step"] = step


def _without_a_micro_batch(trainer: Trainer) -> None:
    """With PyTorch's arithmetic: multiply the loss of a micro-batch by zero."""
    passes, indices = trainer.replica.passes, count(_owned(trainer)[0])

    def hook(_module: Any, _inputs: Any, outputs: Any) -> Any:
        is_skipped = next(indices) == _Now.micro_batch
        return (outputs[0] * 0, outputs[1]) if is_skipped else outputs

    if isinstance(passes, AutogradPasses):
        passes.objective.register_forward_hook(hook)


def _owned(trainer: Trainer) -> Range:
    return trainer.ownership.micro_batches


BEFORE: dict[str, Callable[[Trainer], None]] = {
    "gradient": _in_gradient,
    "parameter": _in_parameters,
    "state": _in_states,
    "skip": _without_a_micro_batch,
}
"""What happens before the step; a wrong sample comes while it is drawn."""

_train_step, _draw, _load = train.train_step, Samples.draw, RecordedPasses._load


def train_step(trainer: Trainer, step: int) -> None:
    planted = os.environ.get(PLANTED)
    fault = Fault(**json.loads(planted)) if planted else None
    if fault and (fault.step, fault.rank) == (step + 1, trainer.topology.rank):
        _Now.fault, _Now.rng = fault, random.Random(fault.seed)  # noqa: S311
        owned, sizes = _owned(trainer), trainer.samples.plan.micro_batch_sizes(step)
        _Now.micro_batch = _Now.rng.choice([m for m in range(*owned) if sizes[m]])
        if fault.kind in BEFORE:
            BEFORE[fault.kind](trainer)
    _train_step(trainer, step)
    _Now.fault = None


def draw(self: Samples, step: int, index: int, owned: Range) -> Any:
    inputs, targets = _draw(self, step, index, owned)
    if _is_now("sample", (index, index + 1)):
        assert isinstance(inputs, Tensor)
        inputs = inputs.clone()
        _flip(inputs.view(-1), _Now.rng.randrange(inputs.numel()))
    return inputs, targets


def load(self: RecordedPasses, step: int, node: Range, piece: Piece) -> None:
    """Load samples for portable kernels, which read bytes where they lie."""
    _load(self, step, node, piece)
    execution, place = self._execution, _Now.micro_batch - node[0]
    if _is_now("skip", node):
        first, end = piece.starts[place : place + 2]
        width = execution.program.positions
        execution.labels[first * width : end * width] = self._ignored
    if _is_now("sample", node) and self._source is not None:
        _Now.copied = self._source.rows.values.copy()
        samples = _Now.copied.reshape(len(_Now.copied), -1)
        row = execution.indices[piece.starts[place]]
        pixel = _Now.rng.randrange(samples.shape[1])
        samples[row, pixel] ^= 1 << _Now.rng.randrange(8)
        execution.call.bytes = _Now.copied.ctypes.data


train.train_step, Samples.draw = train_step, draw  # type: ignore[method-assign]
RecordedPasses._load = load  # type: ignore[method-assign]
