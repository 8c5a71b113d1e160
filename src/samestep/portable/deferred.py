"""Gradients of matrices that the update computes: activations are exchanged instead.

A gradient is as large as its matrix. Written by each worker, read by others, it costs
more time than it takes to compute, since it fits no cache; what it is made of, the
inputs of a layer and the gradients of its outputs, is small where a step has few
samples. So these stay in memory that all workers of the machine map, and after the
barrier each worker computes some rows of each matrix's gradient, of all micro-batches,
up the tree; these rows are updated while they are in its caches. The chains are
the same, and so are the bits, whether this is done in a step or not.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from samestep.config.recipe import Recipe
from samestep.core import tree
from samestep.core.metric import COUNTED
from samestep.core.ownership import shares
from samestep.core.plan import Plan
from samestep.data.dataset import Dataset
from samestep.exchange import Exchange, Room, Summands
from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels, Optimizer, Update
from samestep.optim.optimizer import state_names
from samestep.optim.param_groups import ParamGroup, Slice, slices
from samestep.portable.pieces import Pieces
from samestep.state.flat import Flat


Ways = Callable[[ParamGroup], Optimizer]
"""The numbers with which a group is updated."""


def may_defer(recipe: Recipe, data: Dataset, workers: int) -> bool:
    """Return whether nothing but the update needs gradients, in most of the steps.

    Clipping and losses that count need all of them before. An average of the weights
    follows the slices of `Exchange.owned`, which are not the rows of matrices. A single
    worker exchanges nothing, and was slower.
    """
    needs_all = recipe.optimizer.max_grad_norm is not None
    needs_all = needs_all or COUNTED in data.own_metrics
    return workers > 1 and not needs_all and not recipe.ema


@dataclass(frozen=True)
class Table:
    """Where the samples of a step are."""

    rows: NDArray[np.int64]
    """`MicroBatch` of the kernels, [M]."""
    most_samples: int
    """How many samples a worker has at most."""
    saved_bytes: int


class DeferredWeights:
    """The update of a model whose matrices' gradients it computes itself."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        flat: Flat,
        exchange: Exchange,
        room: Room,
        execution: Execution,
        kernels: Kernels,
    ) -> None:
        """Divide the rows of all matrices among the workers.

        `execution` computes in this worker's piece of the `room`.
        """
        self.is_due = False
        """Whether the step that was computed last left these gradients."""
        self._exchange, self._room, self._execution = exchange, room, execution
        self._plan, self._pieces, self._run = plan, Pieces(plan), kernels.update_parts
        self._even = shares(plan.micro_batches, exchange.workers)
        self._tables: dict[int, Table] = {}
        self.saved_bytes = 0
        """How much less all workers read of each other's memory in such a step."""
        groups = slices(recipe.optimizer, flat.layout, (0, flat.size))
        self._groups = list(dict.fromkeys(part.group for part in groups))
        own = slices(recipe.optimizer, flat.layout, exchange.owned)
        self._parts = np.array([*self._matrices(groups), *self._rest(own)])
        self._optimizers = (Optimizer * len(self._groups))()
        self._summands = Summands([], [])
        states = exchange.states[: len(state_names(recipe.optimizer))]
        first, second = ([self._whole(s.data_ptr()) for s in states] + [None] * 2)[:2]
        self._update = Update(
            ops=execution.operations,
            call=ctypes.addressof(execution.call),
            parts=self._parts.ctypes.data,
            num_parts=len(self._parts),
            optimizers=ctypes.addressof(self._optimizers),
            parameters=exchange.parameters.data_ptr(),
            state1=first,
            state2=second,
        )

    def _whole(self, address: int) -> int:
        """Return where a vector begins whose own slice has this address."""
        return address - 4 * self._exchange.owned[0]

    def _matrices(self, groups: Sequence[Slice]) -> Iterator[list[int]]:
        program, rank = self._execution.program, self._room.own
        for number in range(len(program.ops))[-program.num_weights :]:
            rows, offset = program.ops[number].i[3:5]
            first, end = shares(rows, self._exchange.workers)[rank]
            (group,) = [p.group for p in groups if p.first <= offset < p.end]
            yield [number, first, end, self._groups.index(group)]

    def _rest(self, own: Sequence[Slice]) -> Iterator[list[int]]:
        """Yield what is left of this worker's slices without the matrices."""
        program, start = self._execution.program, self._exchange.owned[0]
        weights = program.ops[-program.num_weights :]
        taken = [(op.i[4], op.i[4] + op.i[2] * op.i[3]) for op in weights]
        for part in own:
            first, end = part.first + start, part.end + start
            group = self._groups.index(part.group)
            cuts = [first, *(c for pair in sorted(taken) for c in pair), end]
            cuts = [min(max(cut, first), end) for cut in cuts]
            for a, b in zip(cuts[::2], cuts[1::2], strict=True):
                if a < b:
                    yield [-1, a, b, group]

    def begin(self, step: int) -> bool:
        """All workers: decide whether the gradients of a step are left to the update.

        They are not if single micro-batches are watched, if a worker has more samples
        than one call takes, or if ownership follows speeds, which are measured without
        the update.
        """
        exchange, table = self._exchange, self._table(step)
        self.is_due = (
            exchange.shares == self._even
            and not exchange.watch.active
            and table.most_samples <= self._execution.call.capacity
        )
        self.saved_bytes = table.saved_bytes
        self._update.micro_batches = table.rows.ctypes.data
        self._update.num_micro_batches = len(table.rows)
        return self.is_due

    def _table(self, step: int) -> Table:
        """Return where the samples of a step are; cached, since steps repeat."""
        size = self._plan.batch_size(step)
        if size not in self._tables:
            rows = np.array(list(self._rows(step)))
            most = max(self._num_samples(step, share) for share in self._even)
            self._tables[size] = Table(rows, most, self._saved_bytes(size))
        return self._tables[size]

    def _num_samples(self, step: int, share: tuple[int, int]) -> int:
        if share[0] == share[1]:
            return 0
        return self._pieces.piece(step, share).starts[-1]

    def _rows(self, step: int) -> Iterator[list[int]]:
        total, pieces = self._plan.micro_batches, self._room.pieces
        for worker, share in enumerate(self._even):
            if share[0] == share[1]:
                continue
            distance = pieces.stride(0) // 4 * (worker - self._room.own)
            starts = self._pieces.piece(step, share).starts
            for m, (first, end) in zip(range(*share), pairwise(starts), strict=True):
                merges = tree.num_merges(m, (0, total), total)
                yield [distance, first, end, merges]

    def _saved_bytes(self, samples: int) -> int:
        """Return how much less all workers read of each other's memory in a step."""
        workers, program = self._exchange.workers, self._execution.program
        partials = sum(
            len(tree.subtrees(share, self._plan.micro_batches)) for share in self._even
        )
        saved = 0
        for op in program.ops[-program.num_weights :]:
            inputs, outputs, _, positions = op.i[2:6]
            # Each reads the others' samples: all features, and outputs for its rows.
            features = (workers - 1) * inputs + (workers - 1) / workers * outputs
            slots = (workers - 1) / workers * partials * inputs * outputs
            saved += round(4 * (slots - samples * positions * features))
        return saved

    def update(self, summands: Summands, ways: Ways, hashes: int | None) -> None:
        """All workers, after the exchange: compute these gradients, and update all.

        Other gradients are the sum of the `summands`. `hashes` is the address of those
        to which the update adds, if any.
        """
        self._update.hashes = hashes
        if summands is not self._summands:
            self._bind(summands)
        for number, group in enumerate(self._groups):
            self._optimizers[number] = ways(group)
        self._run(ctypes.addressof(self._update))

    def _bind(self, summands: Summands) -> None:
        addresses = [self._whole(leaf.data_ptr()) for leaf in summands.leaves]
        self._leaves = (ctypes.c_void_p * len(addresses))(*addresses)
        self._order = (ctypes.c_int32 * len(summands.order))(*summands.order)
        self._update.leaves = ctypes.addressof(self._leaves)
        self._update.order = ctypes.addressof(self._order)
        self._update.order_size = len(summands.order)
        self._summands = summands
