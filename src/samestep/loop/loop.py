"""Exactness for people who keep their own loop: docs/own-loop.md.

The model, the loss, the optimizer and the schedule stay the user's. A global batch
comes as micro-batches, of which each worker gets its own; when they are over, `.grad`
holds the gradient of the whole global batch, the same bits on every worker and at any
number of workers.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from samestep.core.ownership import shares
from samestep.core.plan import Plan, derive_seed
from samestep.core.topology import Topology
from samestep.errors import OwnCodeError, PlacementError, ReplicasDiffer
from samestep.exchange import Exchange
from samestep.exchange.gloo import GlooExchange
from samestep.loop.changes import LoopFlat
from samestep.loop.guard import Guard
from samestep.loop.metrics import Piece, Tally, Value
from samestep.loop.process_group import join, place
from samestep.loop.weighing import Weights
from samestep.models.user_model import check_parameters, check_types
from samestep.state.flat import dense
from samestep.user_code import seeding
from samestep.verification import replicas
from samestep.verification.dry_run import check_gradients, constant_buffers
from samestep.verification.mutation_check import MutationCheck
from samestep.verification.threads import check as check_threads


Batches = Iterator[Any]
WHO = "the model"
TYPE = "Trained parameters are all float32, or all float64 (`model.double()`)"


class Loop:
    """One worker of a training loop that `torchrun`, or nothing, has started."""

    def __init__(
        self,
        model: nn.Module,
        micro_batches: int,
        *,
        seed: int = 0,
        reduction: Literal["mean", "sum"] = "mean",
        threads: int = 1,
        timeout_seconds: float = 600.0,
    ) -> None:
        """All workers: join the others, each with a model of the same weights.

        Seed torch before you build the model. Every global batch is computed in so many
        `micro_batches`, whichever workers compute them. The result depends on them, on
        the `seed` of order and dropout, and on the number of torch's `threads`.
        `reduction` is that of the loss over its samples. A worker that waits for
        another for longer than `timeout_seconds` fails. Raises PlacementError,
        OwnCodeError.
        """
        if reduction not in ("mean", "sum"):
            raise OwnCodeError(
                "A loss is the `mean` over its samples, or their `sum`; received "
                f"`{reduction}`. Reduce it before `backward`."
            )
        torch.set_num_threads(threads)
        check_threads(threads)
        self.rank, self.workers = place()
        if self.workers > micro_batches:
            raise PlacementError(
                f"{self.workers} workers cannot share {micro_batches} micro-batches: "
                "each worker computes at least one. Start fewer workers, or raise "
                "`micro_batches` (this changes the result)."
            )
        join(self.workers, timeout_seconds)
        self._model = model
        self._micro_batches, self._seed = micro_batches, seed
        self._reduction = reduction
        self._shares = shares(micro_batches, self.workers)
        self._flatten()
        self._is_checked = False
        self._summed = 0
        """Steps whose gradient is complete."""
        self._tally = Tally()
        self._weights, self._guard = Weights(micro_batches), Guard()
        self._check_start()

    def steps(
        self,
        data: Any,
        global_batch: int,
        epoch: int,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> Iterator[Batches]:
        """All workers: yield the optimizer steps of one epoch, counted from 0.

        `data` has a length and an index, like a map-style data set; its order is drawn
        from the seed and the epoch. Each step is an iterator over this worker's own
        micro-batches, put together by `collate`. At its end, every parameter's `grad`
        is that of the whole global batch. A micro-batch without samples, in a short
        last batch, is left out.
        """
        if min(len(data), global_batch) < 1:
            raise OwnCodeError(
                "An epoch has samples, and so has a global batch; received "
                f"{len(data)} and {global_batch}."
            )
        plan = Plan(len(data), global_batch, self._micro_batches, self._seed)
        order = plan.order(epoch)
        for index in range(plan.steps_per_epoch):
            before = self._summed
            yield self._step(plan, order, epoch, index, data, collate)
            if self._summed == before:
                raise OwnCodeError(
                    "The micro-batches of a step are iterated over to their end, where "
                    f"the gradients are summed; those of step {index} of epoch {epoch} "
                    "were not."
                )

    def share(
        self,
        data: Any,
        batch: int,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> Batches:
        """Yield this worker's share of the batches of `data`, for an evaluation.

        Together the workers see every sample once.
        """
        size, count = len(data), -(-len(data) // batch)
        row = self._tally.begin_row(count)
        with seeding.kept():
            for index in range(*shares(count, self.workers)[self.rank]):
                samples = torch.arange(index * batch, min((index + 1) * batch, size))
                seeding.seed(derive_seed(self._seed, "share", index))
                with self._tally.of(Piece(row, index, len(samples))):
                    yield _fetch(data, samples, collate)

    def add(self, **metrics: Value | tuple[Value, Value]) -> None:
        """Note sums over the samples of the batch at hand, or sums and counts.

        Raises OwnCodeError outside of a loop over batches.
        """
        for name, value in metrics.items():
            self._tally.add(name, value)

    def weigh(self, count: Value) -> None:
        """Set how many targets the loss of the micro-batch at hand is over.

        They are, for example, those that are not padding; or `count` is the sum of
        their weights. The gradient is then that of the sum over all targets of the
        global batch, divided by their count. With `reduction="mean"`, a loss is the
        mean over these targets, and where there are none it adds nothing, though it may
        be NaN. In a step all micro-batches are weighed, each once, or none. Raises
        OwnCodeError.
        """
        self._weights.set(float(count))

    def mean(self) -> dict[str, float]:
        """All workers: return what was added since the last call, by samples or counts.

        Summed in float64 in the order of the canonical tree over the pieces of a step,
        then step by step: the same bits at any number of workers. NaN where a count is
        zero.
        """
        return self._tally.means(self._exchange, self.rank)

    def fingerprint(self) -> str:
        """All workers: return the SHA-256 of the weights.

        Raises ReplicasDiffer if not all workers have the same.
        """
        return replicas.common_fingerprint(
            self._model, self.rank, self._exchange, is_own=True
        )

    def print(self, *values: object) -> None:
        """Print on rank 0 only; all workers compute what is printed."""
        if self.rank == 0:
            print(*values, flush=True)

    def _check_start(self) -> None:
        try:
            self.fingerprint()
        except ReplicasDiffer:
            raise OwnCodeError(
                "Every worker builds the model itself, and they have other weights "
                "than each other. Call `torch.manual_seed` before building it."
            ) from None

    def _step(
        self,
        plan: Plan,
        order: Tensor,
        epoch: int,
        index: int,
        data: Sized,
        collate: Callable[[list[Any]], Any],
    ) -> Batches:
        """All workers: yield the own micro-batches of one global batch."""
        row = self._tally.begin_row(plan.micro_batches)
        number = epoch * plan.steps_per_epoch + index
        flat, size = self._follow_model(), plan.batch_size(index)
        self._weights.begin()
        # Random numbers between two steps must not depend on the micro-batches.
        with seeding.kept(), self._guard.of_step(flat.parameters):
            for m in range(*self._shares[self.rank]):
                samples = plan.micro_batch(order, index, m)
                flat.restore_buffers()
                for parameter in flat.parameters:
                    parameter.grad = None
                with self._exchange.accumulate(m):
                    if len(samples):
                        seeding.seed(derive_seed(self._seed, "step", number, m))
                        fetch = partial(_fetch, data, samples, collate)
                        yield from self._pass(Piece(row, m, len(samples)), fetch, size)
                flat.is_weighed = m in self._weights
                self._exchange.after_backward(m)
        self._sum(size, plan.num_pieces(index))

    def _pass(
        self, piece: Piece, fetch: Callable[[], Any], global_batch: int
    ) -> Batches:
        """Yield a micro-batch, then make its gradients ready for the exchange."""
        m, same = piece.number, self._guard.of_micro_batch(self._flat.parameters)
        with self._tally.of(piece), self._weights.of(m), self._checked(), same:
            yield fetch()
        self._unchanged.check()
        check_gradients(self._model, WHO)
        self._scale_gradients(self._weights.count(m, piece.samples) / global_batch)

    def _follow_model(self) -> LoopFlat:
        """Return the vectors, after the user may have frozen or replaced parameters."""
        trained = [p for p in self._model.parameters() if p.requires_grad]
        types = {p.dtype for p in trained} - {self._flat.dtype}
        if types or [id(p) for p in trained] != [id(p) for p in self._flat.parameters]:
            self._flatten()
        self._flat.keep_buffers()
        self._unchanged.note()
        return self._flat

    def _flatten(self) -> None:
        check_parameters(self._model, WHO)
        first = next(p.dtype for p in self._model.parameters() if p.requires_grad)
        wanted = first if first is torch.float64 else torch.float32
        check_types(self._model, WHO, wanted, TYPE)
        kinds = {p.device.type for p in self._model.parameters()}
        if kinds != {"cpu"}:
            raise OwnCodeError(
                f"A loop trains on CPUs; the model is on {', '.join(sorted(kinds))}."
            )
        self._flat = LoopFlat(self._model)
        # The model is not attached: parameters keep their own memory, and each worker
        # updates its own copy of all of them, with any optimizer.
        self._exchange: Exchange = GlooExchange(
            self._flat, self._shares, Topology.on_one_node(self.rank, self.workers)
        )
        self._unchanged = MutationCheck(self._model, self._flat, WHO)

    def _scale_gradients(self, share: float) -> None:
        """Replace the gradients by what they add to that of the whole global batch.

        `share` is that of the micro-batch in the mean. These are copies, since the
        exchange adds to them: a user may keep what is in `grad`.
        """
        for parameter in self._flat.parameters:
            if parameter.grad is None:
                continue
            gradient = dense(parameter.grad.detach())
            if self._reduction == "sum":
                parameter.grad = gradient.clone()
            else:  # the mean over no targets may be NaN
                parameter.grad = gradient * share if share else None

    def _sum(self, size: int, with_samples: int) -> None:
        """All workers: set gradients and buffers to those of the global batch."""
        flat = self._flat
        total, tail = self._exchange.sum()
        # The exchange overwrites its vector in the next step; `grad` is the user's.
        # A copy begins at the same alignment at any number of workers.
        gradient = total.clone()
        num_weighed = int(tail[-1])
        count = self._weights.total(self._exchange, num_weighed, with_samples)
        if count:
            gradient.mul_((size if self._reduction == "mean" else 1) / count)
        elif count == 0:
            gradient.zero_()
            self._warn_of_no_targets()
        for parameter, view in zip(flat.parameters, flat.views(gradient), strict=True):
            parameter.grad = view
        flat.advance(tail, self._micro_batches)
        self._summed += 1

    def _warn_of_no_targets(self) -> None:
        if self.rank == 0:
            warnings.warn(
                "No target of this step counts: `weigh` received 0 in each of its "
                "micro-batches. The gradient is zero.",
                stacklevel=4,
            )

    @contextlib.contextmanager
    def _checked(self) -> Iterator[None]:
        """Check, in the first micro-batch, which buffers a pass changes."""
        if self._is_checked:
            yield
            return
        before = {name: b.clone() for name, b in self._model.named_buffers()}
        yield
        constant_buffers(self._model, before, WHO)
        self._is_checked = True


def _fetch(data: Any, samples: Tensor, collate: Callable[[list[Any]], Any]) -> Any:
    if isinstance(data, TensorDataset) and collate is default_collate:
        return [tensor[samples] for tensor in data.tensors]
    return collate([data[i] for i in samples.tolist()])
