"""Metrics of torchmetrics: their states are merged over micro-batches, in order.

Otherwise each process would add up its own samples, and sums of floats would depend on
which samples these are. Here the state of each micro-batch begins at its default;
those of a global batch are merged in the canonical tree by the metric's own reductions,
and the result with that of earlier batches. So all processes have the state of all
samples.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities.data import (
    dim_zero_cat,
    dim_zero_max,
    dim_zero_min,
    dim_zero_sum,
)

from samestep.core import tree
from samestep.core.ownership import lengths, shares
from samestep.errors import OwnCodeError


class State(NamedTuple):
    """What a metric has seen."""

    values: dict[str, Any]
    updates: int = 0
    has_value: bool = False
    """Whether it was called, so that it has a value of the batch."""


class Metrics:
    """The metrics of a module."""

    def __init__(self, module: nn.Module, micro_batches: int) -> None:
        """Take those that the module has now."""
        self._micro_batches = micro_batches
        self.all = list(metrics_of(module).values())
        for metric in self.all:
            _check(metric)
            # Every process has the state of all samples: there is nothing to sync.
            metric.distributed_available_fn = _nowhere
        self._before = self.read()
        self._states: list[list[State]] = []
        """For each micro-batch of this process, those of the metrics."""
        self.updated: list[Metric] = []
        """Those that were updated in this global batch."""
        self.reset()

    def read(self) -> list[State]:
        """Return what the metrics have seen."""
        return [read(metric) for metric in self.all]

    def write(self, states: list[State]) -> None:
        """Let the metrics have seen this."""
        for metric, state in zip(self.all, states, strict=True):
            write(metric, state)

    def reset(self) -> None:
        """Let the metrics have seen nothing."""
        for metric in self.all:
            metric.reset()
            metric._forward_cache = None

    @contextmanager
    def of_micro_batch(self) -> Iterator[None]:
        """Take what the metrics see inside for what they see in one micro-batch."""
        yield
        self.take(self.read())
        self.reset()

    def take(self, states: list[State]) -> None:
        """Add what the metrics have seen in the next micro-batch of this process."""
        self._states.append(states)

    def merge(self, size: int) -> None:
        """All processes: let metrics have seen this global batch and those before.

        The value of the batch, if there is one, is that of all its samples.
        """
        sizes = lengths(shares(size, self._micro_batches))
        with_samples = [m for m, samples in enumerate(sizes) if samples]
        found = dict(zip(with_samples, _gathered(self._states), strict=True))
        for i, (metric, before) in enumerate(zip(self.all, self._before, strict=True)):
            nothing = read(metric)
            leaves = [found[m][i] if m in found else nothing for m in range(len(sizes))]
            parts = {(m, m + 1): leaf for m, leaf in enumerate(leaves)}
            whole = tree.reduce(len(sizes), parts, _merger(metric))
            write(metric, whole)
            value = metric.compute() if whole.has_value else None
            write(metric, _merger(metric)(before, whole))
            metric._forward_cache = value
            self.updated += [metric] * bool(whole.updates)


def _nowhere() -> bool:
    return False


def _gathered(own: list[list[State]]) -> list[list[State]]:
    """All processes: return the states of all micro-batches with samples, in order."""
    if dist.get_world_size() == 1:
        return own
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return [states for of in every for states in of]


def metrics_of(module: nn.Module) -> dict[str, Metric]:
    """Return the metrics of a module by their names in it."""
    named = module.named_modules()
    return {name: each for name, each in named if isinstance(each, Metric)}


def read(metric: Metric) -> State:
    """Return what a metric has seen."""
    values = {
        name: list(value) if isinstance(value, list) else value.detach().clone()
        for name, value in metric.metric_state.items()
    }
    return State(values, metric._update_count, metric._forward_cache is not None)


def write(metric: Any, state: State) -> None:
    """Let a metric have seen this."""
    for name, value in state.values.items():
        setattr(metric, name, list(value) if isinstance(value, list) else value.clone())
    metric._update_count, metric._computed = state.updates, None
    metric._forward_cache = True if state.has_value else None


def _merger(metric: Metric) -> Callable[[State, State], State]:
    """Return what merges two states of this metric, the earlier one first."""

    def merge(left: State, right: State) -> State:
        values = {
            name: _merged(metric._reductions[name], value, right.values[name])
            for name, value in left.values.items()
        }
        has_value = left.has_value or right.has_value
        return State(values, left.updates + right.updates, has_value)

    return merge


def _merged(reduction: Any, left: Any, right: Any) -> Any:
    if isinstance(left, list) or reduction is dim_zero_sum:
        return left + right
    if reduction is dim_zero_cat:
        return torch.cat([left, right])
    return (torch.maximum if reduction is dim_zero_max else torch.minimum)(left, right)


def _check(metric: Metric) -> None:
    """Raise OwnCodeError unless states of parts can be merged to those of all."""
    for name, reduction in metric._reductions.items():
        default = metric._defaults[name]
        if isinstance(default, list):
            is_known = reduction in (dim_zero_cat, None)
        elif reduction is dim_zero_sum:
            is_known = not default.any()
        else:
            is_known = reduction in (dim_zero_max, dim_zero_min, dim_zero_cat)
        if not is_known:
            raise OwnCodeError(
                "The states of a metric are merged over micro-batches, as `sum` from "
                f"0, `max`, `min`, `cat` or lists; `{name}` of "
                f"{type(metric).__name__} has another `dist_reduce_fx`. Log numbers, "
                "or compute the metric from samples that you have listed."
            )
