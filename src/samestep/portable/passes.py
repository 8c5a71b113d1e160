"""The forward and backward passes of a worker's micro-batches, as one program.

All micro-batches that a worker owns are computed together: the products of one are the
same whatever is computed beside it. Their gradients are separate sums, added up the
canonical tree inside the kernels; only the partials are written, to where the exchange
wants them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samestep.config.model import CrossEntropy, LossRecipe
from samestep.core import tree
from samestep.core.ownership import Share, shares
from samestep.core.plan import Plan, derive_seed
from samestep.core.tree import Range
from samestep.data.dataset import Dataset
from samestep.exchange import Exchange
from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels, OpKind
from samestep.kernels.lower import LossOp, Places, lower
from samestep.kernels.program import Program
from samestep.models.objective import ignored_label
from samestep.portable import inputs
from samestep.portable.norms import squared_norm
from samestep.state.flat import Flat


MAX_SAMPLES = 1024
"""Samples that are computed together at most, which bounds the memory."""

Draw = Callable[[int, int, Share], tuple[Any, Any]]
"""Draws inputs and targets of a micro-batch; see `training.trainer.Samples`."""


def places_of(flat: Flat) -> Places:
    """Return where a model's tensors lie in its vectors."""
    names = [entry.name for entry in flat.layout.parameters]
    parameters = dict(zip(names, flat.layout.offsets, strict=False))
    buffers, place = dict[str, int](), 0
    for entry in flat.layout.buffers:
        buffers[entry.name] = place
        place += entry.numel
    return Places(parameters, buffers)


def loss_op(loss: LossRecipe) -> LossOp:
    """Return the operation of a built-in loss."""
    if isinstance(loss, CrossEntropy):
        ignored = ignored_label(loss)
        return LossOp(OpKind.CROSS_ENTROPY, loss.label_smoothing, ignored)
    return LossOp(OpKind.SQUARED_ERROR)


def training_program(
    model: nn.Module, data: Dataset, loss: LossRecipe, flat: Flat
) -> Program:
    """Record the model's passes in training. Raises NotPortable."""
    return lower(model, data.input_shape, places_of(flat), loss_op(loss))


@dataclass(frozen=True)
class Piece:
    """A range of micro-batches of one step, which a call computes."""

    starts: list[int]
    """Where each begins among the call's samples, and where the last ends."""
    kernel_starts: Tensor
    """The same, for the kernels."""
    merges: Tensor
    """How many sums of the tree each completes."""
    first: int
    """The first sample in the epoch's order, counted from the step's first."""


@dataclass
class RecordedPasses:
    """A worker's micro-batches, by a program."""

    plan: Plan
    data: Dataset
    exchange: Exchange
    flat: Flat
    execution: Execution
    draw: Draw
    kernels: Kernels
    source: inputs.ByteInputs | None
    ignored: int
    _epoch: int = -1
    _order: inputs.Numbers = field(default_factory=lambda: np.empty(0, np.int64))
    _pieces: dict[tuple[Range, int], Piece] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        model: nn.Module,
        data: Dataset,
        plan: Plan,
        loss: LossRecipe,
        flat: Flat,
        exchange: Exchange,
        draw: Draw,
        kernels: Kernels,
    ) -> "RecordedPasses":
        """Record the model, and make room for what a call computes at most."""
        program = training_program(model, data, loss, flat)
        source = inputs.inputs_of(data, "train", in_training=True)
        if source is not None:
            program = source.adapted(program)
        largest = -(-plan.global_batch // plan.micro_batches)
        samples = min(plan.global_batch, max(MAX_SAMPLES, largest))
        execution = Execution(program, kernels, samples, plan.micro_batches)
        execution.bind(parameters=exchange.parameters)
        return cls(
            plan,
            data,
            exchange,
            flat,
            execution,
            draw,
            kernels,
            source,
            ignored_label(loss),
        )

    def run(
        self,
        step: int,
        owned: Share,
        lap: Callable[[str], float],
        record: Callable[[int, float, list[float]], None],
    ) -> None:
        """Compute the worker's `owned` micro-batches of a step, counted from 0.

        Calls `lap` with each phase that ends, and `record` with the sums of each.
        """
        slots = self.exchange.partials()
        if owned[0] == owned[1]:
            return
        num_targets = self._batch_size(step) * self.data.targets_per_sample
        self.execution.call.weight = 1 / num_targets
        if self.flat.tail:
            self.execution.bind(running=self.flat.saved_buffers())
        run = _Run(self, step, owned, lap, record)
        if not self.exchange.watch.active and self._fits(owned, step):
            run.compute(owned, slots)
            return
        subtrees = tree.subtrees(owned, self.plan.micro_batches)
        for node, slot in zip(subtrees, slots, strict=True):
            run.sum(node, slot)

    def _batch_size(self, step: int) -> int:
        return self.plan.batch_size(step % self.plan.steps_per_epoch)

    def _fits(self, node: Range, step: int) -> bool:
        piece = self.piece(node, self._batch_size(step))
        capacity: int = self.execution.call.capacity
        return piece.starts[-1] <= capacity

    def piece(self, node: Range, batch_size: int) -> Piece:
        """Return the parts of a range of micro-batches of a global batch."""
        key = node, batch_size
        if key not in self._pieces:
            num = self.plan.micro_batches
            parts = shares(batch_size, num)[slice(*node)]
            first = parts[0][0]
            starts = [start - first for start, _ in parts] + [parts[-1][1] - first]
            merges = [tree.num_merges(m, node, num) for m in range(*node)]
            self._pieces[key] = Piece(
                starts, torch.tensor(starts), torch.tensor(merges), first
            )
        return self._pieces[key]

    def samples(self, step: int, piece: Piece) -> inputs.Numbers:
        """Return the training samples of a piece, int64 [n]."""
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.plan.order(epoch).numpy()
        first = step_in_epoch * self.plan.global_batch + piece.first
        return self._order[first : first + piece.starts[-1]]


@dataclass
class _Run:
    """One step of one worker."""

    passes: RecordedPasses
    step: int
    owned: Share
    lap: Callable[[str], float]
    record: Callable[[int, float, list[float]], None]

    def sum(self, node: Range, out: Tensor) -> None:
        """Write the sum over a node of the tree into a vector [size + tail].

        In pieces that fit, or one by one where single micro-batches are watched.
        """
        passes, watch = self.passes, self.passes.exchange.watch
        is_single = node[1] - node[0] == 1
        if is_single or (not watch.active and passes._fits(node, self.step)):
            self.compute(node, [out])
            if watch.active:
                gradient = out[: passes.flat.size]
                watch.note_square(node[0], squared_norm(passes.kernels, gradient))
            return
        middle = tree.split(node)
        self.sum((node[0], middle), out)
        right = torch.zeros_like(out)
        self.sum((middle, node[1]), right)
        out.add_(right)

    def compute(self, node: Range, slots: Sequence[Tensor]) -> None:
        """Compute micro-batches by one call; their partials go to `slots`."""
        passes, execution = self.passes, self.passes.execution
        program = execution.program
        piece = passes.piece(node, passes._batch_size(self.step))
        self._load(node, piece)
        execution.bind_micro_batches(piece.kernel_starts, piece.merges)
        execution.bind_slots(slots, passes.flat.size)
        if program.has_dropout:
            seed = passes.plan.seed
            for place, m in enumerate(range(*node)):
                execution.keys[place] = derive_seed(seed, "step", self.step, m)
        end = program.num_loads + program.num_forward
        execution.run(0, program.num_loads)
        self.lap("data")
        execution.run(program.num_loads, end)
        self.lap("forward")
        execution.run(end)
        self._record(node, piece)
        self.lap("backward")

    def _load(self, node: Range, piece: Piece) -> None:
        passes, execution = self.passes, self.passes.execution
        if passes.source is not None:
            passes.source.load(execution, passes.samples(self.step, piece))
            return
        drawn = [passes.draw(self.step, m, self.owned) for m in range(*node)]
        floats, targets = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        inputs.load_floats(execution, floats, targets)

    def _record(self, node: Range, piece: Piece) -> None:
        passes, execution = self.passes, self.passes.execution
        metrics, counted = passes.data.own_metrics, 0
        losses = execution.loss_sums.tolist()
        measured = execution.metric_sums.tolist()
        for place, m in enumerate(range(*node)):
            if metrics:
                part = slice(piece.starts[place], piece.starts[place + 1])
                counted = inputs.num_counted(execution.labels[part], passes.ignored)
            loss = losses[place]
            cells = inputs.cells_of(metrics, loss, measured[place], counted)
            self.record(m, loss, cells)
