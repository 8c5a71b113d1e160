"""What Lightning forgets when it stops in the midst of an epoch.

These are the sums of what was logged, so that its means would be those of the steps
since then, the states of metrics, and gradients that are accumulated over batches.
"""

from typing import Any

from samestep.lightning.metrics import Metrics, State, metrics_of, read, write


KEY = "samestep"
"""The key of what samestep adds to a checkpoint."""
COUNT = "cumulated_batch_size"


class Midway:
    """The sums of a training epoch, which goes on where it was stopped."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Any]] = {}
        self._metrics: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        """What callbacks saw last, also of the epoch before."""
        self._gradients: dict[str, Any] = {}
        self._updated: set[Any] = set()
        """The metrics that training steps have updated."""

    def save(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the epoch to a checkpoint."""
        sums = {
            key: [result.value.clone(), getattr(result, COUNT, 0)]
            for key, result in _results(module).items()
            if result.is_tensor and result.meta.on_epoch
        }
        metrics = {
            name: list(read(metric))
            for name, metric in metrics_of(module).items()
            if metric in self._updated
        }
        gradients = {
            name: parameter.grad.detach().clone()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None and _is_accumulating(module)
        }
        shown = {k: v.clone() for k, v in module.trainer.callback_metrics.items()}
        checkpoint[KEY] = {
            "sums": sums,
            "metrics": metrics,
            "shown": shown,
            "gradients": gradients,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the sums of a checkpoint, in the next training step."""
        saved = checkpoint.get(KEY, {})
        self._sums, self._metrics, self._shown, self._gradients = (
            dict(saved.get(part, {}))
            for part in ("sums", "metrics", "shown", "gradients")
        )

    def begin(self, module: Any) -> None:
        """Before a training step: let metrics and gradients go on."""
        if module.trainer.fit_loop.epoch_loop.batch_idx == 0:
            self._sums, self._metrics = {}, {}
        module.trainer._logger_connector._callback_metrics.update(self._shown)
        for name, gradient in self._gradients.items():
            module.get_parameter(name).grad = gradient
        metrics = metrics_of(module) if self._metrics else {}
        for name, state in self._metrics.items():
            write(metrics[name], State(*state))
        self._metrics, self._shown, self._gradients = {}, {}, {}

    def go_on(self, module: Any, metrics: Metrics) -> None:
        """After a training step: add what had been logged before, once."""
        self._updated.update(metrics.updated)
        results = _results(module)
        for key in self._sums.keys() & results.keys():
            (value, count), result = self._sums.pop(key), results[key]
            if result.meta.is_max_reduction or result.meta.is_min_reduction:
                result.value = result.meta.reduce_fx(value, result.value)
            else:
                result.value = value + result.value
            if result.meta.is_mean_reduction:
                result.cumulated_batch_size = count + result.cumulated_batch_size


def _is_accumulating(module: Any) -> bool:
    """Return whether gradients of now may belong to the next step, too."""
    loop = module.trainer.fit_loop.epoch_loop
    return not module.automatic_optimization or loop._should_accumulate()


def _results(module: Any) -> dict[str, Any]:
    results: dict[str, Any] = module.trainer.fit_loop.epoch_loop._results
    return results
