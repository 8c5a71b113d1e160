"""Evaluation by recorded programs: each sample's loss and answer."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from samestep.config.model import CustomLoss
from samestep.core.metric import Metric, num_cells
from samestep.core.plan import derive_seed
from samestep.data.dataset import Dataset
from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels
from samestep.kernels.lower import lower
from samestep.models.modes import evaluating
from samestep.models.objective import Objective, ignored_label
from samestep.portable import inputs
from samestep.portable.initial import from_counters
from samestep.portable.passes import loss_of, places_of
from samestep.state.flat import Flat


TARGET, ANSWER, LOSS, METRIC = range(4)
"""Rows of what is measured of single samples."""


@dataclass
class RecordedEvaluation:
    """Measures samples, each alone: batches only bound the memory."""

    objective: Objective
    """With the loss of an evaluation."""
    data: Dataset
    flat: Flat
    parameters: Tensor
    """[size]: the vector that the model's parameters are views of."""
    kernels: Kernels
    batch: int
    seed: int
    """The recipe's, for models that draw in evaluation, too."""
    _prepared: dict[str, tuple[Execution, inputs.ByteInputs | None]] = field(
        default_factory=dict
    )

    def measure(self, split: str, samples: Tensor) -> Tensor:
        """Measure at most `batch` samples int64 [n]; return float64 [rows, n].

        The rows are the target (0 for values), the answer, the loss without label
        smoothing, and 1 for a right answer or the absolute error. Of a sample with
        several targets, they are how many count, 0, and sums over them. Of a loss of
        the user's own, they are what it measures, itself first.
        """
        self.prepare(split)
        execution, source = self._prepared[split]
        if source is not None:
            source.load(execution, samples.numpy())
        else:
            inputs.load_samples(execution, *self.data.splits[split].gather(samples))
        size, cells = len(samples), execution.program.cells
        execution.bind(running=self.flat.saved_buffers())
        if execution.program.has_draws:
            self._bind_draws(execution, split, samples)
        else:
            execution.bind_micro_batches(torch.tensor([0, size]), torch.tensor([0]))
        execution.run()
        if cells:
            of_samples = execution.losses[: size * cells].reshape(size, cells)
            return torch.from_numpy(of_samples.T.astype(float))
        shape = size, execution.program.positions
        last = size * shape[1]
        labels = execution.labels[:last].reshape(shape)
        answers = execution.answers[:last].reshape(shape)
        if shape[1] == 1:
            rows = [part[:, 0].astype(float) for part in (labels, answers)]
        else:
            counts = (labels != ignored_label(self.objective.loss)).sum(axis=1)
            rows = [counts.astype(float), np.zeros(size)]
        # `accumulate` adds one by one; `sum` would not.
        measured = (execution.losses[:last], execution.metrics[:last])
        sums = (np.add.accumulate(p.reshape(shape), 1, float)[:, -1] for p in measured)
        return torch.from_numpy(np.stack([*rows, *sums]))

    def prepare(self, split: str) -> None:
        """Record the model for a split, unless that was done before."""
        if split not in self._prepared:
            self._prepared[split] = self._prepare(split)

    @property
    def rows(self) -> int:
        """How many numbers `measure` returns of a sample."""
        if isinstance(self.objective.loss, CustomLoss):
            return 1 + num_cells(self.data.own_metrics)
        return 4

    def _bind_draws(self, execution: Execution, split: str, samples: Tensor) -> None:
        """Make each sample a micro-batch, with a key of its own."""
        for place, sample in enumerate(samples.tolist()):
            seed = derive_seed(self.seed, "evaluation", split, sample)
            execution.keys[place] = seed
        starts = torch.arange(len(samples) + 1)
        execution.bind_micro_batches(starts, torch.zeros_like(starts[1:]))

    def batches(self, first: int, end: int) -> Iterator[Tensor]:
        """Cut the samples from `first` to before `end` into batches."""
        yield from torch.split(torch.arange(first, end), self.batch)

    def _prepare(self, split: str) -> tuple[Execution, inputs.ByteInputs | None]:
        """Return the program for a split, and its samples if they are bytes."""
        model, places = self.objective.model, places_of(self.flat)
        with evaluating(model), from_counters(0) as building:
            program = lower(
                model,
                inputs.kinds_of(self.data),
                places,
                loss_of(self.objective, self.data),
                backward=False,
                why_not=building.reason,
            )
        source = inputs.inputs_of(self.data, split, in_training=False)
        if source is not None:
            program = source.adapted(program)
        micro_batches = self.batch if program.has_draws else 1
        execution = Execution(program, self.kernels, self.batch, micro_batches)
        execution.bind(parameters=self.parameters)
        return execution, source

    def totals(self, measured: Tensor, metrics: tuple[Metric, ...]) -> list[float]:
        """Return the exact sums of the loss and of the metrics' cells.

        `measured` [4, n] is of all samples, so how they were cut into batches and
        shared among workers does not matter.
        """
        if isinstance(self.objective.loss, CustomLoss):
            return [math.fsum(row.tolist()) for row in measured]
        loss, right = (math.fsum(measured[row].tolist()) for row in (LOSS, METRIC))
        labels = measured[TARGET].long().numpy()
        if self.data.targets_per_sample == 1:
            counted = inputs.num_counted(labels, ignored_label(self.objective.loss))
        else:
            counted = int(labels.sum())
        return [loss, *inputs.cells_of(metrics, loss, right, counted)]
