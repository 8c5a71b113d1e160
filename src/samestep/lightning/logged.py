"""What a module logs in its micro-batches becomes one value of the global batch."""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torchmetrics import Metric

from samestep.errors import OwnCodeError
from samestep.lightning.metrics import Metrics
from samestep.lightning.termination import Termination
from samestep.loop.loop import Loop


LOSS = "loss"
"""The name of the loss itself; no key of `log`, which are JSON."""


class Logged:
    """Takes calls of `self.log` in micro-batches, and passes on one value of all.

    That is the mean over the samples of the global batch, or over the `batch_size` that
    a call gives, or the sum or an extreme of what micro-batches have logged: the same
    bits in every process, and at any number of them. So there is nothing left for
    `sync_dist` to do.
    """

    def __init__(
        self,
        loop: Loop,
        micro_batches: int,
        termination: Termination,
        is_within: Callable[[], bool],
    ) -> None:
        """`is_within` says whether a micro-batch is computed in manual optimization."""
        self._loop, self._micro_batches = loop, micro_batches
        self._termination, self._is_within = termination, is_within
        self._extremes: dict[str, list[float]] = {}
        """For each key, the values of which the largest or smallest is logged."""
        self._signature: inspect.Signature | None = None
        """That of `log`, since finding it takes long."""
        self._metrics: list[str] = []
        """Calls with a metric of torchmetrics, as JSON."""

    @contextmanager
    def taking(self, module: Any) -> Iterator[Metrics]:
        """Take what the module logs inside; yield its metrics."""
        log = module.log

        def take(*positional: Any, **named: Any) -> None:
            self._signature = self._signature or inspect.signature(log)
            options = dict(self._signature.bind(*positional, **named).arguments)
            if not self._loop.samples:
                # Between micro-batches, hooks see what is the same in all processes;
                # in one that another process logs, nothing is taken.
                if not self._is_within():
                    log(**options)
                return
            name, value = options.pop("name"), options.pop("value")
            for option in ("sync_dist", "sync_dist_group", "enable_graph"):
                options.pop(option, None)
            if isinstance(value, Metric):
                self._add_metric(module, name, value, options)
            else:
                self._add(name, value, options)

        module.log = take
        try:
            yield Metrics(module, self._micro_batches)
        finally:
            del module.log

    def _add(self, name: str, value: Any, options: dict[str, Any]) -> None:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        reduction = _reduction(name, options.pop("reduce_fx", "mean"))
        count = options.pop("batch_size", None) or self._loop.samples
        key = json.dumps([name, reduction, options])
        if reduction in ("max", "min"):
            self._extremes.setdefault(key, []).append(number)
        is_mean = reduction == "mean"
        noted = (number * count, float(count)) if is_mean else (number, 1.0)
        self._loop.add(**{key: noted})

    def _add_metric(
        self, module: Any, name: str, metric: Metric, options: dict[str, Any]
    ) -> None:
        attributes = (n for n, each in module.named_modules() if each is metric)
        attribute = options.pop("metric_attribute", None) or next(attributes, None)
        if attribute is None:
            raise OwnCodeError(
                f"The metric that is logged as `{name}` must be an attribute of the "
                "module, so that it is merged over micro-batches."
            )
        options.pop("batch_size", None)
        call = json.dumps([name, attribute, options])
        if call not in self._metrics:
            self._metrics.append(call)

    def pass_on(self, module: Any, metrics: Metrics, size: int) -> float | None:
        """All processes: log values of the batch, and return the mean loss, if any."""
        totals = self._loop.totals()
        self._termination.agree(totals)
        loss, count = totals.pop(LOSS, (None, 0.0))
        extremes = self._all_extremes(totals)
        for key, (total, of) in totals.items():
            name, reduction, options = json.loads(key)
            if reduction == "mean":
                mean = total / of if of else math.nan
                module.log(name, mean, batch_size=of, **options)
            else:
                value = extremes.get(key, total)
                module.log(name, value, reduce_fx=reduction, **options)
        if metrics.all:
            metrics.merge(size)
            calls = [call for of in self._loop.gather(self._metrics) for call in of]
            for name, attribute, options in map(json.loads, dict.fromkeys(calls)):
                module.log(name, module.get_submodule(attribute), **options)
        self._metrics, self._extremes = [], {}
        return None if loss is None else loss / count

    def _all_extremes(self, totals: dict[str, Any]) -> dict[str, float]:
        """All processes: return the extremes of all micro-batches."""
        reductions = {key: json.loads(key)[1] for key in totals}
        wanted = {k: r for k, r in reductions.items() if r in ("max", "min")}
        if not wanted:
            return {}
        every = self._loop.gather(self._extremes)
        values = {k: [v for of in every for v in of.get(k, [])] for k in wanted}
        return {
            key: float(
                getattr(torch.tensor(values[key], dtype=torch.float64), reduction)()
            )
            for key, reduction in wanted.items()
        }


def _reduction(name: str, given: Any) -> str:
    called = str(getattr(given, "__name__", given)).lower().replace("avg", "mean")
    if called not in ("mean", "sum", "max", "min"):
        raise OwnCodeError(
            "Numbers of micro-batches are reduced by `mean`, `sum`, `max` or `min`; "
            f"`{name}` is logged with `reduce_fx={called}`. Log a torchmetrics metric."
        )
    return called
