"""The forward and backward passes of a worker's micro-batches, as one program.

All micro-batches that a worker owns are computed together: the products of one are the
same with anything computed beside it. Their gradients are separate sums, added up the
canonical tree inside the kernels; only the partials are written, to where the exchange
wants them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from samestep.config.model import CrossEntropy, CustomLoss, LossRecipe
from samestep.config.recipe import Recipe
from samestep.core import tree
from samestep.core.ownership import Share
from samestep.core.plan import Plan, derive_seed
from samestep.core.tree import Range
from samestep.data.dataset import Dataset
from samestep.exchange import Exchange
from samestep.exchange.autograd import Draw, Instruments
from samestep.kernels.execution import Execution, workspace_bytes
from samestep.kernels.interface import Kernels, OpKind
from samestep.kernels.lower import lower
from samestep.kernels.program import Program
from samestep.kernels.trace import Kind, OwnLoss
from samestep.kernels.values import (
    LossOp,
    Places,
)
from samestep.models.objective import Objective, ignored_label
from samestep.portable import inputs
from samestep.portable.deferred import DeferredWeights, may_defer
from samestep.portable.initial import from_counters
from samestep.portable.norms import squared_norm
from samestep.portable.pieces import Piece, Pieces
from samestep.state.flat import Flat


MAX_SAMPLES = 1024
"""Samples that are computed together at most, which bounds the memory."""


def places_of(flat: Flat) -> Places:
    """Return where a model's tensors lie in its vectors."""
    names = [entry.name for entry in flat.layout.parameters]
    parameters = dict(zip(names, flat.layout.offsets, strict=False))
    buffers, place = dict[str, int](), 0
    for entry in flat.layout.buffers:
        buffers[entry.name] = place
        place += entry.numel
    return Places(parameters, buffers, flat.layout.counters)


def loss_op(loss: LossRecipe) -> LossOp:
    """Return the operation of a built-in loss."""
    if isinstance(loss, CrossEntropy):
        ignored = ignored_label(loss)
        return LossOp(OpKind.CROSS_ENTROPY, loss.label_smoothing, ignored)
    return LossOp(OpKind.SQUARED_ERROR)


def loss_of(objective: Objective, data: Dataset) -> LossOp | OwnLoss:
    """Return how a program measures outputs."""
    if not isinstance(objective.loss, CustomLoss):
        return loss_op(objective.loss)
    _, targets = data.splits["train"].gather(torch.zeros(1, dtype=torch.int64))
    return OwnLoss(objective.summands, Kind(tuple(targets.shape[1:]), targets.dtype))


def training_program(objective: Objective, data: Dataset, flat: Flat) -> Program:
    """Record the passes of a model with its loss in training.

    Raises NotPortable, NotReproducible.
    """
    given, places, loss = (
        inputs.kinds_of(data),
        places_of(flat),
        loss_of(objective, data),
    )
    with from_counters(0) as building:  # constants of the forward pass, too
        why_not = building.reason
        return lower(objective.model, given, places, loss, why_not=why_not)


class RecordedPasses:
    """A worker's micro-batches, by a program."""

    def __init__(
        self,
        objective: Objective,
        data: Dataset,
        plan: Plan,
        recipe: Recipe,
        flat: Flat,
        exchange: Exchange,
        draw: Draw,
        kernels: Kernels,
    ) -> None:
        """Record the model and its loss, and make room for what a call computes.

        `draw` gives the samples of a micro-batch where they are not bytes in memory.
        Raises NotPortable, NotReproducible.
        """
        self.kernels, self._plan, self._data, self._draw = kernels, plan, data, draw
        self._flat, self._exchange = flat, exchange
        self._ignored = ignored_label(recipe.loss)
        self._pieces, self._owned = Pieces(plan), (0, 0)
        program = training_program(objective, data, flat)
        self.recorded = program
        """The passes as recorded, which load their inputs as floats or tokens."""
        self._source = inputs.inputs_of(data, "train", in_training=True)
        if self._source is not None:
            program = self._source.adapted(program)
        largest = -(-plan.global_batch // plan.micro_batches)
        samples = min(plan.global_batch, max(MAX_SAMPLES, largest))
        size = samples, plan.micro_batches
        room = None
        if may_defer(recipe, data, exchange.workers):
            program = program.with_weights_last(plan.global_batch)
        if program.num_weights:
            room = exchange.room(workspace_bytes(program, *size))
        own = None if room is None else room.pieces[room.own]
        self._execution = Execution(program, kernels, *size, own)
        self._execution.bind(parameters=exchange.parameters)
        self.weights: DeferredWeights | None = None
        """What computes gradients of matrices in the update instead, if that pays."""
        if room is not None:
            self.weights = DeferredWeights(
                recipe, plan, flat, exchange, room, self._execution, kernels
            )

    def run(self, step: int, owned: Share, instruments: Instruments) -> None:
        """Compute the worker's `owned` micro-batches of a step, counted from 0.

        Their partials go to where the exchange wants them, if not to the update.
        """
        slots, self._end = self._exchange.partials(), len(self._execution.program.ops)
        if self.weights is not None and self.weights.begin(step):
            self._end -= self._execution.program.num_weights
            instruments.read_less(self.weights.saved_bytes)
        self._write(step, owned, slots, instruments)

    def write(
        self,
        step: int,
        owned: Share,
        partials: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Compute any micro-batches of a step; write all of their partials."""
        self._end = len(self._execution.program.ops)
        if self.weights is not None:
            self.weights.is_due = False
        self._write(step, owned, partials, instruments)

    def _write(
        self,
        step: int,
        owned: Share,
        slots: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Do so; usually one call computes them all."""
        self._owned = owned
        if owned[0] == owned[1]:
            return
        instruments.begin_micro_batch()
        size = self._plan.batch_size(step)
        self._execution.call.weight = 1 / (size * self._data.targets_per_sample)
        if self._flat.tail:
            self._execution.bind(running=self._flat.saved_buffers())
        if self._is_one_call(step, owned):
            self._compute(step, owned, slots, instruments)
            return
        subtrees = tree.subtrees(owned, self._plan.micro_batches)
        for node, slot in zip(subtrees, slots, strict=True):
            self._sum(step, node, slot, instruments)

    def _is_one_call(self, step: int, node: Range) -> bool:
        """Return whether there is room, and no single micro-batch is watched."""
        piece, capacity = self._pieces.piece(step, node), self._execution.call.capacity
        return piece.starts[-1] <= capacity and not self._exchange.watch.active

    def _sum(
        self, step: int, node: Range, out: Tensor, instruments: Instruments
    ) -> None:
        """Write the sum over a node of the tree into a vector [size + tail]."""
        if node[1] - node[0] == 1 or self._is_one_call(step, node):
            self._compute(step, node, [out], instruments)
            if self._exchange.watch.active:
                norm = squared_norm(self.kernels, out[: self._flat.size])
                self._exchange.watch.note_square(node[0], norm)
            return
        middle = tree.split(node)
        self._sum(step, (node[0], middle), out, instruments)
        right = torch.zeros_like(out)
        self._sum(step, (middle, node[1]), right, instruments)
        out.add_(right)

    def _compute(
        self,
        step: int,
        node: Range,
        slots: Sequence[Tensor],
        instruments: Instruments,
    ) -> None:
        """Compute micro-batches by one call; their partials go to `slots`."""
        execution, program = self._execution, self._execution.program
        piece = self._pieces.piece(step, node)
        self._load(step, node, piece)
        execution.bind_micro_batches(piece.kernel_starts, piece.merges)
        execution.bind_slots(slots, self._flat.size)
        if program.has_draws:
            for place, m in enumerate(range(*node)):
                key = derive_seed(self._plan.seed, "step", step, m)
                execution.keys[place] = key
        end = program.num_loads + program.num_forward
        execution.run(0, program.num_loads)
        instruments.lap("data")
        execution.run(program.num_loads, end)
        instruments.lap("forward")
        execution.run(end, self._end)
        self._record(node, piece, instruments)
        instruments.lap("backward")

    def _load(self, step: int, node: Range, piece: Piece) -> None:
        if self._source is not None:
            self._source.load(self._execution, self._pieces.samples(step, piece))
            return
        drawn = [self._draw(step, m, self._owned) for m in range(*node)]
        drawn_inputs, targets = zip(*drawn, strict=True)
        inputs.load_samples(
            self._execution, inputs.together(drawn_inputs), inputs.joined(targets)
        )

    def _record(self, node: Range, piece: Piece, instruments: Instruments) -> None:
        if self._execution.program.cells:
            sums = self._execution.cell_sums[: node[1] - node[0]].tolist()
            for m, (loss, *cells) in zip(range(*node), sums, strict=True):
                instruments.record(m, loss, cells)
            return
        metrics, counted = self._data.own_metrics, 0
        losses = self._execution.loss_sums.tolist()
        measured = self._execution.metric_sums.tolist()
        for place, m in enumerate(range(*node)):
            if metrics:
                positions = self._execution.program.positions
                first, end = piece.starts[place : place + 2]
                labels = self._execution.labels[first * positions : end * positions]
                counted = inputs.num_counted(labels, self._ignored)
            cells = inputs.cells_of(metrics, losses[place], measured[place], counted)
            instruments.record(m, losses[place], cells)
