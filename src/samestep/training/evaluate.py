"""Evaluation: every sample exactly once, the same bits at any number of workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from samestep.config.model import CustomLoss
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
from samestep.models.objective import ignored_label, outputs, without_smoothing
from samestep.portable.evaluation import ANSWER, LOSS, TARGET, RecordedEvaluation
from samestep.system.heartbeat import Heartbeat
from samestep.system.json_values import JsonObject
from samestep.training.components import ModelAndData
from samestep.user_code import seeding
from samestep.user_code.references import names


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

    def results(self, name: str, in_detail: bool = False) -> JsonObject:
        """All workers: return the loss and metrics of a split, empty without samples.

        If `in_detail`, also how a classifier answers for single samples.
        """
        data, details = self.parts.data, JsonObject()
        if len(data.splits[name]) == 0:
            return {}
        # The outputs of an own loss may be no logits.
        has_logits = not isinstance(self.parts.recipe.loss, CustomLoss)
        if in_detail and data.task == "classification" and has_logits:
            sums, details = self.inspect(name)
        else:
            sums = self.evaluate(name)
        results = {**sums.means(data.metrics), **details}
        return {f"{name}_{key}": value for key, value in results.items()}

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
        objective = self.parts.objective(without_smoothing(self.parts.recipe.loss))
        split = data.splits[name]
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
        """All workers: measure every sample of a split, float64 [rows, n]."""
        size = len(self.parts.data.splits[name])
        measured = torch.zeros(recorded.rows, size, dtype=torch.float64)
        recorded.prepare(name)  # before generators are seeded: it draws a sample
        for samples in self._batches_to_measure(recorded, name):
            self.heartbeat.beat()
            measured[:, samples] = recorded.measure(name, samples)
        self.heartbeat.at_barrier()
        return self.exchange.merge(measured)

    def _batches_to_measure(
        self, recorded: RecordedEvaluation, name: str
    ) -> Iterator[Tensor]:
        """Yield this worker's samples, in batches.

        The user's data set may draw: then batches are the same for all workers.
        """
        if "data" in names(self.parts.recipe):
            yield from (samples for _, samples in self._own_batches(name))
            return
        size = len(self.parts.data.splits[name])
        yield from recorded.batches(*shares(size, self.exchange.workers)[self.rank])

    @torch.no_grad()  # not in inference mode: a model may ask for gradients
    def inspect(self, name: str) -> tuple[MetricSums, JsonObject]:
        """All workers: evaluate a split, and list a classifier's answers for samples.

        `confusion` counts samples by [true class][answer]; `worst` are those with the
        highest losses, the highest first.
        """
        data, ignored = self.parts.data, ignored_label(self.parts.recipe.loss)
        if self.recorded is None:
            sums, cells = self.evaluate(name), self._answers(name)
        else:  # one pass measures what both need
            measured = self._measure(self.recorded, name)
            totals = self.recorded.totals(measured, data.own_metrics)
            sums, cells = self._sums(name, *totals), measured[[TARGET, ANSWER, LOSS]]
        return sums, _summarise(cells, data.outputs, ignored)

    def _answers(self, name: str) -> Tensor:
        """All workers: return targets, answers, losses of a split, float64 [3, n]."""
        model, recipe = self.parts.model, self.parts.recipe
        split, ignored = self.parts.data.splits[name], ignored_label(recipe.loss)
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
        return self.exchange.merge(cells)

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
