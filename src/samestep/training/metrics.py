"""Sums over samples, the same at any number of workers.

Every worker notes the loss and the metrics of its own micro-batches; now and
then the notes are merged (each cell comes from one worker, so adding zeros is exact)
and summed in the order of the canonical tree. Losses are float64 sums over samples.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samestep.core import tree
from samestep.core.metric import COUNTED, Metric
from samestep.core.topology import Topology
from samestep.errors import NonFiniteLoss
from samestep.exchange import Exchange
from samestep.training import cadence
from samestep.training.cadence import Decision
from samestep.training.timing import PHASES, Times


@dataclass
class Sums:
    """Totals over targets, such as samples or tokens."""

    loss: float = 0.0
    metrics: list[float] = field(default_factory=list)
    """Cells of metrics (`objective.Metric`), exact if they count; none: all zero."""
    targets: int = 0

    def add(self, other: "Sums") -> None:
        """In the order of the calls."""
        self.loss += other.loss
        before = self.metrics or [0.0] * len(other.metrics)
        self.metrics = [a + b for a, b in zip(before, other.metrics, strict=True)]
        self.targets += other.targets

    def divisor(self, metrics: Sequence[Metric]) -> float:
        """What the loss, and metrics without a count of their own, are divided by."""
        return self.metrics[1] if COUNTED in metrics else self.targets

    def means(self, metrics: Sequence[Metric]) -> dict[str, float]:
        """`loss` and the metrics by name, per target or by their own counts.

        Without metrics whose count is zero: JSON has no word for what they are. The
        loss of no target that counts is 0.
        """
        found = {"loss": self.loss / self.targets}
        divisor = self.divisor(metrics)
        cells = iter(self.metrics)
        for metric in metrics:
            total = next(cells)
            count = next(cells) if metric.has_count else divisor
            if count:
                found[metric.name] = total / count
        return found


def tree_sum(cells: Tensor) -> Tensor:
    """[..., M] -> [...]: sums over M in the order of the canonical tree."""
    leaves = {(m, m + 1): cells[..., m] for m in range(cells.shape[-1])}
    return tree.reduce(cells.shape[-1], leaves, torch.add)


class StepLedger:
    """What happened in the steps since the last call of `close`."""

    def __init__(
        self,
        micro_batches: int,
        capacity: int,
        topology: Topology,
        exchange: Exchange,
        metric_cells: int,
    ) -> None:
        """Room for `capacity` steps; `metric_cells` are those of a micro-batch."""
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
        ]
        sizes = [math.prod(shape) for shape in shapes]
        self._all = torch.zeros(sum(sizes), dtype=torch.float64)
        parts = torch.split(self._all, sizes)
        views = [part.view(s) for part, s in zip(parts, shapes, strict=True)]
        self._loss, self._metrics, self._arrived, self._phases, self._told = views
        # The same memory through numpy, where writing a cell takes 0.1 us, not 5.
        self._loss_cells, self._metric_cells, self._arrived_cells = (
            view.numpy() for view in views[:3]
        )

    def open(self, step: int, size: int) -> int:
        """A row for one step of `size` targets; steps are counted from 0."""
        if not self._sizes:
            self._first_step = step
        self._sizes.append(size)
        return len(self._sizes) - 1

    def note(
        self, row: int, micro_batch: int, loss: float, metrics: list[float]
    ) -> None:
        """The sums over one own micro-batch."""
        self._loss_cells[row, micro_batch] = loss
        self._metric_cells[:, row, micro_batch] = metrics

    def counts(self, row: int) -> Tensor:
        """All workers: what the loss of each micro-batch counted, float64 [M]."""
        return self._exchange.merge(self._metrics[1, row].clone())

    def arrive(self, row: int, seconds: float) -> None:
        """When this worker's last gradient was ready.

        Every machine has a clock of its own: on several, the time counts from the end
        of the last merge, which all workers leave at about the same moment.
        """
        self._arrived_cells[row, self._rank] = seconds - self._origin

    @property
    def rows(self) -> int:
        """Steps since the last call of `close`."""
        return len(self._sizes)

    def close(
        self, phases: list[float], decision: Decision
    ) -> tuple[list[Sums], Times, Decision]:
        """All workers: what all of them noted.

        Returns the sums of each step, what they took, and the decision of rank 0, or
        to stop if any worker's is. Raises NonFiniteLoss, alike on all workers, for the
        first such micro-batch.
        """
        rows = len(self._sizes)
        cells = decision.to_cells(len(self._told))
        self._told[self._rank] = torch.tensor(cells, dtype=torch.float64)
        self._phases[self._rank] = torch.tensor(phases, dtype=torch.float64)
        self._exchange.merge(self._all)
        if not self._has_one_clock:
            self._origin = time.perf_counter()
        loss, metrics = self._loss[:rows], self._metrics[:, :rows]
        self._check(loss)
        totals = tree_sum(loss).tolist(), tree_sum(metrics).T.tolist()
        sums = list(map(Sums, *totals, self._sizes))
        times = tell_waiting(self._phases.clone(), self._arrived[:rows])
        told = Decision.from_cells(self._told[0].tolist())
        told = replace(told, stop=bool(self._told[:, cadence.STOP].any()))
        self._all.zero_()
        self._sizes.clear()
        return sums, times, told

    def _check(self, loss: Tensor) -> None:
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


def tell_waiting(seconds: Tensor, arrived: Tensor) -> Times:
    """Moves the time until the last worker arrived from `exchange` to `wait`.

    `arrived` is float64 [steps, workers].
    """
    exchange, wait = PHASES.index("exchange"), PHASES.index("wait")
    last, latest = arrived.max(dim=1, keepdim=True)
    waiting = last - arrived
    waited = waiting.sum(dim=0).minimum(seconds[:, exchange])
    seconds[:, exchange] -= waited
    seconds[:, wait] += waited
    others = max(1, arrived.shape[1] - 1)
    waited_for = torch.zeros(arrived.shape[1], dtype=torch.float64)
    waited_for.index_add_(0, latest.flatten(), waiting.sum(dim=1) / others)
    return Times(seconds, waited_for)
