"""Evaluation: every sample exactly once, the same bits at any number of workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from samestep.config.model import CrossEntropy
from samestep.core.metric import COUNTED, num_cells
from samestep.core.ownership import shares
from samestep.core.plan import derive_seed
from samestep.core.progress import MetricSums
from samestep.core.tree import tree_sum
from samestep.data import pytree
from samestep.errors import DataError
from samestep.exchange import Exchange
from samestep.models.device import Device
from samestep.models.modes import evaluating
from samestep.models.objective import ignored_label, outputs
from samestep.portable.evaluation import ANSWER, LOSS, TARGET, RecordedEvaluation
from samestep.system.heartbeat import Heartbeat
from samestep.system.json_values import JsonObject
from samestep.training.components import ModelAndData
from samestep.user_code import seeding


MAX_WORST = 12
"""How many samples with the highest losses a result lists."""


@dataclass(frozen=True)
class Evaluator:
    """Measure a model on the splits of its data; all workers take part.

    A split is cut into batches; a worker computes a contiguous share of them.
    """

    parts: ModelAndData
    rank: int
    exchange: Exchange
    heartbeat: Heartbeat
    device: Device
    recorded: RecordedEvaluation | None = None
    """With portable arithmetic: what measures the samples."""

    @torch.no_grad()  # not in inference mode: a model may ask for gradients
    def evaluate(self, name: str) -> MetricSums:
        """All workers: sum the loss (without label smoothing) and metrics of a split.

        The sums of its batches are added in the order of the canonical tree. Raises
        DataError if the loss counts targets and none counts.
        """
        data = self.parts.data
        if self.recorded is not None:
            measured = self._measure(self.recorded, name)
            sums = self.recorded.totals(measured, data.own_metrics)
            return self._sums(name, *sums)
        # Label smoothing belongs to training; without it losses are comparable.
        loss = self.parts.recipe.loss
        if isinstance(loss, CrossEntropy):
            loss = CrossEntropy(ignore_index=loss.ignore_index)
        objective, split = self.parts.objective(loss), data.splits[name]
        shape = 1 + num_cells(data.own_metrics), self._num_batches(name)
        cells = torch.zeros(shape, dtype=torch.float64)
        with evaluating(self.parts.model):
            for index, samples in self._own_batches(name):
                cells[0, index], cells[1:, index] = objective(
                    *self.device.to_device(*split.gather(samples))
                )
        self.heartbeat.at_barrier()
        return self._sums(name, *tree_sum(self.exchange.merge(cells)).tolist())

    def _sums(self, name: str, total: float, *measured: float) -> MetricSums:
        """Return the sums over a split. Raises DataError if no target counts."""
        data = self.parts.data
        if COUNTED in data.own_metrics and not measured[1]:
            raise DataError(
                f"No target of the split `{name}` counts: all are ignored, so there is "
                "no loss. Hold out other samples, or none."
            )
        size = len(data.splits[name]) * data.targets_per_sample
        return MetricSums(loss=total, metrics=list(measured), targets=size)

    def _measure(self, recorded: RecordedEvaluation, name: str) -> Tensor:
        """All workers: measure every sample of a split, float64 [4, n]."""
        size = len(self.parts.data.splits[name])
        first, end = shares(size, self.exchange.workers)[self.rank]
        measured = torch.zeros(4, size, dtype=torch.float64)
        for samples in recorded.batches(first, end):
            self.heartbeat.beat()
            measured[:, samples] = recorded.measure(name, samples)
        self.heartbeat.at_barrier()
        return self.exchange.merge(measured)

    @torch.no_grad()  # not in inference mode: a model may ask for gradients
    def inspect(self, name: str) -> JsonObject:
        """All workers: list how a classifier answers for single samples of a split.

        `confusion` counts samples by [true class][answer]; `worst` are those with the
        highest losses, the highest first.
        """
        model, recipe = self.parts.model, self.parts.recipe
        split, classes = self.parts.data.splits[name], self.parts.data.outputs
        ignored = ignored_label(recipe.loss)
        if self.recorded is not None:
            measured = self._measure(self.recorded, name)
            return _summarise(measured[[TARGET, ANSWER, LOSS]], classes, ignored)
        device = self.device.target
        cells = torch.zeros(3, len(split), dtype=torch.float64)
        with evaluating(model):
            for _, samples in self._own_batches(name):
                inputs, targets = split.gather(samples)
                inputs = pytree.apply(lambda tensor: tensor.to(device), inputs)
                targets = targets.to(device)
                logits = outputs(model, inputs, recipe.precision)
                losses = functional.cross_entropy(
                    logits, targets, reduction="none", ignore_index=ignored
                )
                answers = logits.argmax(dim=1)
                rows = [targets.double(), answers.double(), losses.double()]
                cells[:, samples] = torch.stack(rows).cpu()
        self.heartbeat.at_barrier()
        self.exchange.merge(cells)
        return _summarise(cells, classes, ignored)

    def _num_batches(self, name: str) -> int:
        batch = self.parts.recipe.evaluation_batch
        return -(-len(self.parts.data.splits[name]) // batch)

    def _own_batches(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the samples of each of this worker's batches.

        Seeds the generators for each batch: a model may draw in evaluation, too.
        """
        recipe, size = self.parts.recipe, len(self.parts.data.splits[name])
        batch = recipe.evaluation_batch
        owned = shares(self._num_batches(name), self.exchange.workers)[self.rank]
        for index in range(*owned):
            self.heartbeat.beat()
            seed = derive_seed(recipe.seed, "evaluation", name, index)
            seeding.seed(seed)
            self.device.seed(seed)
            yield index, torch.arange(index * batch, min((index + 1) * batch, size))


def _summarise(cells: Tensor, classes: int, ignored: int) -> JsonObject:
    """Summarise cells [3, n], float64: target, answer and loss of each sample."""
    (numbers,) = (cells[0] != ignored).nonzero(as_tuple=True)
    targets, answers = cells[:2, numbers].long()
    losses = cells[2, numbers]
    counts = torch.bincount(targets * classes + answers, minlength=classes**2)
    worst = losses.argsort(descending=True, stable=True)[:MAX_WORST]
    samples = [
        {
            "index": int(numbers[i]),
            "target": int(targets[i]),
            "predicted": int(answers[i]),
            "loss": losses[i].item(),
        }
        for i in worst.tolist()
    ]
    return {"confusion": counts.view(classes, -1).tolist(), "worst": samples}
