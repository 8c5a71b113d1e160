"""Exactness for people who keep their own loop: docs/own-loop.md.

The model, the loss, the optimizer and the schedule stay the user's. A global batch
comes as micro-batches, of which each worker gets its own; when they are over, `.grad`
holds the gradient of the whole global batch, the same bits on every worker and at any
number of workers.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from samestep.core.ownership import shares
from samestep.core.plan import Plan, derive_seed
from samestep.errors import OwnCodeError, PlacementError, ReplicasDiffer
from samestep.exchange.tree_gather import Partials
from samestep.loop.guard import Guard
from samestep.loop.metrics import Piece, Tally, Value
from samestep.loop.process_group import Group
from samestep.loop.weighing import Weights
from samestep.models.user_model import check_parameters, check_types
from samestep.state.flat import Flat
from samestep.user_code import seeding
from samestep.verification import replicas
from samestep.verification.dry_run import check_gradients, constant_buffers
from samestep.verification.threads import check as check_threads
from samestep.verification.watch import MutationCheck


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
        """All workers, each with the same weights: seed torch before building them.

        Every global batch is computed in so many `micro_batches`, whoever computes
        them; they, the `seed` of order and dropout, and the `threads` of torch are what
        the result depends on. `reduction` says what the loss is over its samples. A
        worker that waits for another for `timeout_seconds` fails. Raises
        PlacementError, OwnCodeError.
        """
        if reduction not in ("mean", "sum"):
            raise OwnCodeError(
                "A loss is the `mean` over its samples, or their `sum`; received "
                f"`{reduction}`. Reduce it before `backward`."
            )
        torch.set_num_threads(threads)
        check_threads(threads)
        self._group = Group()
        self.rank, self.workers = self._group.rank, self._group.workers
        if self.workers > micro_batches:
            raise PlacementError(
                f"{self.workers} workers cannot share {micro_batches} micro-batches: "
                "each worker computes at least one. Start fewer workers, or raise "
                "`micro_batches` (this changes the result)."
            )
        self._group.join(timeout_seconds)
        self._model = model
        self._flatten()
        self._micro_batches, self._seed = micro_batches, seed
        self._reduction = reduction
        owned = shares(micro_batches, self.workers)
        self._owned, self._partials = owned[self.rank], Partials(owned, self.rank)
        self._is_checked = False
        self._summed = 0
        """Steps whose gradient is complete."""
        self._tally = Tally(self._group)
        self._weights, self._guard = Weights(self._group, micro_batches), Guard()
        self._check_start()

    def steps(
        self,
        data: Any,
        global_batch: int,
        epoch: int,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> Iterator[Batches]:
        """All workers: the optimizer steps of one epoch, counted from 0.

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
        """This worker's share of batches, to evaluate: all workers see all samples."""
        size, count = len(data), -(-len(data) // batch)
        row = self._tally.begin_row()
        with seeding.kept():
            for index in range(*shares(count, self.workers)[self.rank]):
                samples = torch.arange(index * batch, min((index + 1) * batch, size))
                seeding.seed(derive_seed(self._seed, "share", index))
                self._tally.piece = Piece(row, count, index, len(samples))
                yield _fetch(data, samples, collate)
                self._tally.piece = None

    def add(self, **metrics: Value | tuple[Value, Value]) -> None:
        """For the batch at hand: sums over its samples, or sums and counts.

        Raises OwnCodeError outside of a loop over batches.
        """
        for name, value in metrics.items():
            self._tally.add(name, value)

    def weigh(self, count: Value) -> None:
        """For the micro-batch at hand: how many targets its loss is over.

        Such as those that are not padding; or the sum of their weights. The gradient is
        then that of the sum over all targets of the global batch, divided by their
        count. With `reduction="mean"`, a loss is the mean over these targets, and where
        there are none it adds nothing, though it may be NaN. Of a step, all
        micro-batches are weighed or none, each once. Raises OwnCodeError.
        """
        self._weights.set(float(count))

    def mean(self) -> dict[str, float]:
        """All workers: what was added since the last call, by samples or counts.

        Summed in float64 in the order of the canonical tree over the pieces of a step,
        then step by step: the same bits at any number of workers. NaN where a count is
        zero.
        """
        return self._tally.means()

    def fingerprint(self) -> str:
        """All workers: SHA-256 of the weights. ReplicasDiffer if there is not one."""
        return replicas.common_fingerprint(
            self._model, self.rank, self._group, is_own=True
        )

    def print(self, *values: object) -> None:
        """On rank 0 only; all workers compute what is printed."""
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
        """All workers: one global batch."""
        row, number = self._tally.begin_row(), epoch * plan.steps_per_epoch + index
        flat, size = self._follow_model(), plan.batch_size(index)
        self._partials.clear()  # of a step that was given up
        self._weights.begin()
        # What the user draws between two steps must not depend on the micro-batches.
        with seeding.kept(), self._guard.of_step(flat.parameters):
            for m in range(*self._owned):
                samples = plan.micro_batch(order, index, m)
                flat.restore_buffers()
                for parameter in flat.parameters:
                    parameter.grad = None
                if len(samples):
                    seeding.seed(derive_seed(self._seed, "step", number, m))
                    self._tally.piece = Piece(row, plan.micro_batches, m, len(samples))
                    same = self._guard.of_micro_batch(flat.parameters)
                    with self._weights.of(m), self._checked(), same:
                        yield _fetch(data, samples, collate)
                    self._unchanged.check()
                    self._tally.piece = None
                self._partials.push(m, self._leaf(m, len(samples), size))
        self._sum(size)

    def _follow_model(self) -> Flat:
        """The user may have frozen or converted parameters, or loaded others."""
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
        self._flat = Flat(self._model)
        self._unchanged = MutationCheck(self._model, self._flat, WHO)

    def _leaf(self, m: int, samples: int, size: int) -> Tensor:
        """[size + changes + 2]: what a micro-batch adds to the gradient, to buffers,
        and to the numbers of micro-batches that are weighed and that have samples.
        """
        flat = self._flat
        leaf = torch.zeros(flat.size + flat.num_changes + 2, dtype=flat.dtype)
        leaf[flat.size : -2] = flat.read_changes()
        if samples:
            check_gradients(self._model, WHO)
            leaf[-2:] = torch.tensor([m in self._weights, True])
            self._fill(leaf[: flat.size], self._weights.count(m, samples) / size)
        return leaf

    def _fill(self, gradient: Tensor, share: float) -> None:
        """[size], zeros; `share` is that of the micro-batch in the mean of the step."""
        is_mean = self._reduction == "mean"
        if is_mean and not share:
            return  # the mean over no targets may be NaN
        torch._foreach_copy_(self._flat.views(gradient), self._flat.gradients())
        if is_mean:
            gradient.mul_(share)

    def _sum(self, size: int) -> None:
        """All workers: gradients and buffers of the whole global batch."""
        flat = self._flat
        total = self._partials.total(flat.size + flat.num_changes + 2, flat.dtype)
        # A copy begins at the same alignment at any number of workers.
        gradient = total[: flat.size].clone()
        count = self._weights.total(*map(int, total[-2:].tolist()))
        if count:
            gradient.mul_((size if self._reduction == "mean" else 1) / count)
        elif count == 0:
            gradient.zero_()
            self._warn_of_no_targets()
        for parameter, view in zip(flat.parameters, flat.views(gradient), strict=True):
            parameter.grad = view
        flat.apply_changes(total[flat.size : -2], self._micro_batches)
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
        """The first micro-batch shows which buffers a pass changes."""
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
