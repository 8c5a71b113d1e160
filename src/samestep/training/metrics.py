"""Loss and metrics as sums over samples, the same at any number of workers.

Every worker records the loss and the metrics of its own micro-batches. Now and then the
records are merged (each cell comes from one worker, so adding zeros is exact) and
summed in the order of the canonical tree. Losses are float64 sums over samples.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from samestep.core.ownership import Share
from samestep.core.progress import MetricSums
from samestep.core.topology import Topology
from samestep.core.tree import tree_sum
from samestep.errors import NonFiniteLoss
from samestep.exchange import Exchange
from samestep.state.hashing import StepHashes
from samestep.training import cadence
from samestep.training.cadence import Decision
from samestep.training.timing import PHASES, Times, separate_waiting


LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Merged:
    """What all workers know after a merge."""

    sums: list[MetricSums]
    """The sums of each step since the last merge."""
    hashes: list[StepHashes]
    """The hashes of each of these steps."""
    micro_batches: str
    """For the ledger of micro-batches: 32 hexadecimal digits for each of these steps
    and each micro-batch, its hash and its worker; empty without that ledger."""
    times: Times
    """The times of all workers."""
    decision: Decision


class MetricsBuffer:
    """Loss, metrics and times of the steps since the last `sync`, one row per step."""

    def __init__(
        self,
        micro_batches: int,
        capacity: int,
        topology: Topology,
        exchange: Exchange,
        metric_cells: int,
        has_micro_batches: bool = False,
    ) -> None:
        """Allocate `capacity` steps with `metric_cells` cells for each micro-batch.

        And with cells for its hash, if `has_micro_batches`.
        """
        workers = exchange.workers
        self._rank, self._exchange = topology.rank, exchange
        self._has_one_clock = topology.nodes == 1
        self._origin = 0.0 if self._has_one_clock else time.perf_counter()
        self._first_step = 0
        self._sizes: list[int] = []
        # One tensor, merged by one collective; the rest are views of its parts.
        shapes: list[tuple[int, ...]] = [
            (capacity, micro_batches),
            (metric_cells, capacity, micro_batches),
            (capacity, workers),
            (workers, len(PHASES)),
            (workers, cadence.num_cells(workers)),
            (capacity, 4),
            (capacity * has_micro_batches, micro_batches, 3),
        ]
        sizes = [math.prod(shape) for shape in shapes]
        self._all = torch.zeros(sum(sizes), dtype=torch.float64)
        parts = torch.split(self._all, sizes)
        views = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
        self._loss, self._metrics, self._arrived, self._phases, self._decisions = views[
            :5
        ]
        self._hashes, self._micro_batches = (view.numpy() for view in views[5:])
        # The same memory through numpy, where writing a cell takes 0.1 us, not 5.
        self._loss_cells, self._metric_cells, self._arrived_cells = (
            view.numpy() for view in views[:3]
        )

    def begin_step(self, step: int, num_targets: int) -> int:
        """Return the row of a step of `num_targets` targets; steps count from 0."""
        if not self._sizes:
            self._first_step = step
        self._sizes.append(num_targets)
        return len(self._sizes) - 1

    def record(
        self, row: int, micro_batch: int, loss: float, metrics: list[float]
    ) -> None:
        """Record the sums over one of this worker's micro-batches."""
        self._loss_cells[row, micro_batch] = loss
        self._metric_cells[:, row, micro_batch] = metrics

    def recorded(self, row: int, micro_batches: Share) -> NDArray[np.float64]:
        """Return the loss and the metrics of some micro-batches of this worker."""
        part = slice(*micro_batches)
        metrics = self._metric_cells[:, row, part].T
        return np.column_stack([self._loss_cells[row, part], metrics])

    def counts(self, row: int) -> Tensor:
        """All workers: return what each micro-batch's loss counted, float64 [M]."""
        return self._exchange.merge(self._metrics[1, row].clone())

    def arrive(self, row: int, seconds: float) -> None:
        """Record when this worker's last gradient was ready.

        Every machine has its own clock: on several, the time counts from the end of the
        last merge, which all workers leave at about the same moment.
        """
        self._arrived_cells[row, self._rank] = seconds - self._origin

    def hash(self, row: int, own: StepHashes) -> None:
        """Record what this worker adds to the hashes of a step.

        In halves of 32 bits, whose sums over all workers are exact in float64.
        """
        halves = ((number >> 32, number & LOW) for number in own)
        self._hashes[row] = [*chain.from_iterable(halves)]

    def hash_micro_batch(self, row: int, micro_batch: int, number: int) -> None:
        """Record the hash of the gradient of one of this worker's micro-batches."""
        halves = number >> 32, number & LOW
        self._micro_batches[row, micro_batch] = *halves, self._rank

    def _merged_hashes(self) -> list[StepHashes]:
        cells = self._hashes[: self.num_steps]
        return [StepHashes(*row) for row in _joined(cells).tolist()]

    def _merged_micro_batches(self) -> str:
        cells = self._micro_batches[: self.num_steps]
        workers = cells[..., 2:].astype(np.uint64)
        numbers = np.concatenate([_joined(cells[..., :2]), workers], axis=-1)
        return numbers.astype(">u8").tobytes().hex()

    @property
    def num_steps(self) -> int:
        """Steps since the last `sync`."""
        return len(self._sizes)

    def sync(self, phases: Sequence[float], decision: Decision) -> Merged:
        """All workers: merge the records of all of them, and start with empty rows.

        The decision is that of rank 0, but to stop if any worker wants to. Raises
        NonFiniteLoss, on all workers, for the first such micro-batch.
        """
        rows = self.num_steps
        cells = decision.to_cells(len(self._decisions))
        self._decisions[self._rank] = torch.tensor(cells, dtype=torch.float64)
        self._phases[self._rank] = torch.tensor(phases, dtype=torch.float64)
        self._exchange.merge(self._all)
        if not self._has_one_clock:
            self._origin = time.perf_counter()
        loss, metrics = self._loss[:rows], self._metrics[:, :rows]
        self._check_finite(loss)
        losses, cells_by_step = tree_sum(loss).tolist(), tree_sum(metrics).T.tolist()
        sums = [
            MetricSums(loss=loss, metrics=cells, targets=targets)
            for loss, cells, targets in zip(
                losses, cells_by_step, self._sizes, strict=True
            )
        ]
        times = separate_waiting(self._phases.clone(), self._arrived[:rows])
        merged = Decision.from_cells(self._decisions[0].tolist())
        merged = replace(merged, stop=bool(self._decisions[:, cadence.STOP].any()))
        hashes, micro_batches = self._merged_hashes(), self._merged_micro_batches()
        # Cells of other workers must be zero before the next merge adds them.
        self._all.zero_()
        self._sizes.clear()
        return Merged(sums, hashes, micro_batches, times, merged)

    def _check_finite(self, loss: Tensor) -> None:
        """Raise NonFiniteLoss for the first loss of [steps, M] that is not finite."""
        bad = (~loss.isfinite()).nonzero()
        if len(bad):
            row, micro_batch = bad[0].tolist()
            raise NonFiniteLoss(
                f"The loss must be finite; at step {self._first_step + row + 1} it "
                f"became {loss[row, micro_batch].item()}, first in micro-batch "
                f"{micro_batch} (both counted as in metrics.jsonl: steps from 1, "
                "micro-batches from 0). Lower `optimizer.lr`, or set "
                "`optimizer.max_grad_norm`."
            )


def _joined(halves: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Return numbers [..., n] of their halves [..., 2 * n]."""
    cells = halves.astype(np.uint64)
    return (cells[..., ::2] << np.uint64(32)) + cells[..., 1::2]
