"""Exactness for people who keep their own loop: docs/own-loop.md.

The model, the loss, the optimizer and the schedule stay the user's. A global batch
comes as micro-batches, of which each worker gets its own; when they are over, `.grad`
holds the gradient of the whole global batch, the same bits on every worker and at any
number of workers.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from samestep.core.ownership import lengths, shares
from samestep.data.batches import GlobalBatch, evaluation_batches, global_batches
from samestep.data.given import GivenData
from samestep.data.loading import Collate
from samestep.data.stream import Bookmark
from samestep.errors import OwnCodeError, PlacementError, ReplicasDiffer
from samestep.loop.balancing import Balance
from samestep.loop.connection import Choice
from samestep.loop.engine import Engine, Reduction
from samestep.loop.metrics import Piece, Tally, Value
from samestep.loop.position import Position
from samestep.loop.process_group import gather, join, place
from samestep.loop.recording import Recording
from samestep.loop.snapshots import Completeness, Snapshots, Stateful
from samestep.system import machine
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding
from samestep.verification import replicas
from samestep.verification.threads import check as check_threads


Batches = Iterator[Any]


class Loop:
    """One worker of a training loop that `torchrun`, or nothing, has started."""

    def __init__(
        self,
        model: nn.Module,
        micro_batches: int,
        *,
        seed: int = 0,
        reduction: Reduction = "mean",
        threads: int = 1,
        exchange: Choice = "auto",
        balance: Balance = "auto",
        timeout_seconds: float = 600.0,
        out: str | Path | None = None,
    ) -> None:
        """All workers: join the others, each with a model of the same weights.

        Seed torch before you build the model. Every global batch is computed in
        `micro_batches` pieces, by any of the workers. The result depends on them, on
        the `seed` of order and dropout, and on the number of torch's `threads`.
        `reduction` is that of the loss over its samples. Gradients are summed in
        `shared` memory, or over `gloo`; `auto` takes the memory where all workers are
        on one machine with Linux. `balance` divides the micro-batches by the measured
        speed of the workers (`auto`), evenly (`off`), or as given, such as `(5, 3)`. A
        worker that waits for another for longer than `timeout_seconds` fails. `out` is
        the run directory, a new one that rank 0 makes before the first step, or that of
        a run to go on with; call `close` at the end. Raises PlacementError,
        OwnCodeError.
        """
        if reduction not in ("mean", "sum"):
            raise OwnCodeError(
                "A loss is the `mean` over its samples, or their `sum`; received "
                f"`{reduction}`. Reduce it before `backward`."
            )
        torch.set_num_threads(threads)
        check_threads(threads)
        machine.keep_freed_memory()
        self.rank, self.workers = place()
        _check_workers(self.workers, micro_batches)
        join(self.workers, timeout_seconds)
        self._model = model
        self._micro_batches, self._seed = micro_batches, seed
        at = self.rank, self.workers
        self._engine = Engine(
            model, micro_batches, at, reduction, exchange, balance, timeout_seconds
        )
        fixed = {"micro_batches": micro_batches, "seed": seed, "reduction": reduction}
        self._position = Position(**fixed)
        self._tally = Tally()
        recipe: JsonObject = {**fixed, "threads": threads}
        placement = {
            "workers": self.workers,
            "exchange": self._engine.exchange_name,
            "balance": balance if isinstance(balance, str) else list(balance),
            "timeout_seconds": timeout_seconds,
        }
        self._recording = Recording(
            out, recipe, placement, self._position, self.rank, self.gather
        )
        self._snapshots: Snapshots | None = None
        self._check_start()

    def steps(
        self,
        data: Any,
        global_batch: int | None = None,
        epoch: int | None = None,
        collate: Collate | None = None,
    ) -> Iterator[Batches]:
        """All workers: yield the optimizer steps of one epoch, counted from 0.

        `data` has a length and an index, like a map-style data set, and its order is
        drawn from the seed and the epoch; or it is a DataLoader, which brings its own
        `global_batch` and `collate`; or a stream, such as an IterableDataset. Each step
        is an iterator over this worker's own micro-batches, put together by `collate`.
        At its end, every parameter's `grad` is that of the whole global batch. A
        micro-batch without samples, in a short last batch, is left out. Raises
        OwnCodeError.
        """
        if epoch is None:
            raise OwnCodeError(
                "The order of the samples follows the epoch: pass its number, counted "
                "from 0: `steps(data, 64, epoch)`, `steps(loader, epoch=epoch)`."
            )
        start, bookmark = self._position.start_of(epoch)
        self._recording.begin_epoch(epoch, start)
        given = data, global_batch, epoch, collate, start, bookmark
        batches = self.global_batches(*given)
        index = start - 1
        for index, batch in enumerate(batches, start):
            self._position.reach(epoch, index, batch.bookmark)
            self._position.begin_step()
            yield self.step(batch)
            if self._position.is_within_step:
                raise OwnCodeError(
                    "The micro-batches of a step are iterated over to their end, where "
                    f"the gradients are summed; those of step {index} of epoch {epoch} "
                    "were not."
                )
            self._recording.lap("optimizer")
            if self._snapshots is not None:
                self._snapshots.after_step()
                self._recording.lap("snapshot")
        if index < 0:
            raise OwnCodeError(
                f"An epoch has samples; epoch {epoch} had none. (A generator is used "
                "up after one: make another for each epoch.)"
            )
        self._position.reach(epoch + 1, 0)
        self._recording.end_epoch(self.fingerprint)

    @property
    def epoch(self) -> int:
        """The epoch to begin or to go on with, counted from 0."""
        return self._position.epoch

    def state_dict(self) -> dict[str, Any]:
        """All workers, between two steps: return what to save with the weights.

        It has the next step, the generators, and what was added since the last `mean`.
        Raises OwnCodeError between the micro-batches of a step.
        """
        position = self._position.state_dict()
        added = self._tally.carry(self._engine.exchange, self.rank)
        return position | self._recording.state_dict() | {"added": added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All workers: go on with what `state_dict` returned, at any number of workers.

        Load the weights and the optimizer of then, too. Raises OwnCodeError.
        """
        self._position.load_state_dict(state)
        self._recording.load_state_dict(state.get("run"))
        self._tally.carry_on(state["added"])

    def keep(self, snapshot_steps: int, **parts: Stateful) -> None:
        """All workers: keep snapshots in memory, for `torchrun --max-restarts`.

        After every `steps` steps, all that the training goes on with is
        saved: the model, the loop, and the `parts`, which are the optimizer, its
        schedule, and anything else with a `state_dict`. If torchrun starts the workers
        again, this loads the newest snapshot. Under anything else, or without restarts,
        there is nothing to do. Raises OwnCodeError, PlacementError.
        """
        every = {"model": self._model, **parts, "loop": self}
        Completeness(list(every.values()))
        self._snapshots = Snapshots(snapshot_steps, every)
        self._snapshots.restore(self._engine.exchange, self.rank)

    def global_batches(
        self,
        data: Any,
        global_batch: int | None = None,
        epoch: int | None = None,
        collate: Collate | None = None,
        start: int = 0,
        bookmark: Bookmark | None = None,
    ) -> Iterator[GlobalBatch]:
        """All workers: yield the global batches of an epoch from number `start` on.

        Each is for `step`, or for `measure` if it is of an evaluation, `epoch` None.
        `data` and the others are as in `steps`, for who has a loop of another library.
        With the `bookmark` of an earlier batch, a stream is not read from its start.
        Raises OwnCodeError.
        """
        source, count = GivenData.of(data, global_batch, collate), self._micro_batches
        if epoch is not None:
            self._recording.note(global_batch=source.global_batch)
        given = source, self._seed, epoch, count, lambda: self._engine.share
        for batch in global_batches(*given, start, bookmark):
            self._agree(batch.digest)
            yield batch

    def step(self, batch: GlobalBatch) -> Batches:
        """All workers: yield the own micro-batches of one global batch.

        At its end, every parameter's `grad` is that of the global batch.
        """
        self._position.begin_step()
        compute = partial(self._engine.step, tally=self._tally)
        yield from self._recording.step(batch, compute)
        self._position.end_step()

    def measure(self, batch: GlobalBatch) -> Batches:
        """All workers: yield the own micro-batches of one batch of an evaluation."""
        row = self._tally.begin_row(self._micro_batches)
        sizes = lengths(shares(batch.size, self._micro_batches))
        with seeding.kept():
            for m in range(*self._engine.share):
                if sizes[m]:
                    with self._tally.of(Piece(row, m, sizes[m])):
                        yield batch.fetch(m)

    def share(
        self,
        data: Any,
        batch: int | None = None,
        collate: Collate | None = None,
    ) -> Batches:
        """Yield this worker's share of the batches of `data`, for an evaluation.

        `data` as in `steps`. Together the workers see every sample once.
        """
        row = self._tally.begin_row()
        source = GivenData.of(data, batch, collate)
        batches = evaluation_batches(source, self._seed, self.rank, self.workers)
        with seeding.kept():
            for index, size, fetch in batches:
                self._tally.has_pieces(row, index + 1)
                if fetch is not None:
                    with self._tally.of(Piece(row, index, size)):
                        yield fetch()

    def add(self, **metrics: Value | tuple[Value, Value]) -> None:
        """Note sums over the samples of the current batch, or sums and counts.

        Raises OwnCodeError outside of a loop over batches.
        """
        self._recording.check(metrics)
        for name, value in metrics.items():
            self._tally.add(name, value)

    @property
    def samples(self) -> int:
        """How many samples the current batch has; 0 outside of a loop over batches."""
        return self._tally.samples

    def weigh(self, count: Value) -> None:
        """Set how many targets the loss of the current micro-batch is over.

        They are, for example, those that are not padding; or `count` is the sum of
        their weights. The gradient is then that of the sum over all targets of the
        global batch, divided by their count. With `reduction="mean"`, a loss is the
        mean over these targets, and where there are none it adds nothing, though it may
        be NaN. In a step all micro-batches are weighed, each once, or none. Raises
        OwnCodeError.
        """
        self._engine.weights.set(float(count))

    def mean(self) -> dict[str, float]:
        """All workers: return what was added since the last call, by samples or counts.

        Summed in float64 in the order of the canonical tree over the pieces of a step,
        then step by step: the same bits at any number of workers. NaN where a count is
        zero.
        """
        means = {
            name: total / count if count else float("nan")
            for name, (total, count) in self.totals().items()
        }
        self._recording.add_means(means)
        return means

    def totals(self) -> dict[str, tuple[float, float]]:
        """All workers: as `mean`, but return sums and counts."""
        return self._tally.totals(self._engine.exchange, self.rank)

    def gather(self, value: Any) -> list[Any]:
        """All workers: return everyone's value, which is JSON, by rank."""
        return gather(self._engine.exchange, self.rank, value)

    def fingerprint(self) -> str:
        """All workers: return the SHA-256 of the weights.

        Raises ReplicasDiffer if not all workers have the same.
        """
        return replicas.common_fingerprint(
            self._model, self.rank, self._engine.exchange, is_own=True
        )

    def close(self) -> None:
        """All workers, at the end: write the result of the run, if there is `out`.

        It has the fingerprint of the weights; a run without a result counts as
        unfinished. Raises OutputError, ReplicasDiffer.
        """
        self._recording.close(self.fingerprint)

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

    def _agree(self, digest: str) -> None:
        """All workers: raise OwnCodeError unless all have the same samples."""
        if digest and len(set(self.gather(digest))) > 1:
            raise OwnCodeError(
                "All workers read the same samples in the same order, and each keeps "
                "its micro-batches; these workers began with different ones. Leave it "
                "to the loop to divide a stream (no `split_by_node`), and do not let "
                "it or a sampler depend on the rank, the process or the time."
            )


def _check_workers(workers: int, micro_batches: int) -> None:
    """Raise PlacementError unless there is a micro-batch for each worker."""
    if workers > micro_batches:
        raise PlacementError(
            f"{workers} workers cannot share {micro_batches} micro-batches: each "
            "worker computes at least one. Start fewer workers, or raise "
            "`micro_batches` (this changes the result)."
        )
