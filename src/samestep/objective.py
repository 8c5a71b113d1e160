"""The model together with its loss: what a micro-batch goes through."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep import dtypes, nested
from samestep.augment import Mixed
from samestep.data_sections import Task
from samestep.errors import OwnCodeError
from samestep.ingredients import CrossEntropy, CustomLoss, LossRecipe, SquaredError
from samestep.nested import Nested
from samestep.own import capital, title
from samestep.recipe import Precision


METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "next-token": "accuracy",
    "regression": "absolute_error",
}
"""What is measured besides the loss: means over all targets."""


class Metric(NamedTuple):
    """What is measured besides the loss, in one cell or in two: a sum and a count."""

    name: str
    has_count: bool = False
    """Else it is a mean over all targets."""


MOST_METRICS = 64
"""Their sums are part of every snapshot."""
WORD = re.compile(r"[^\W\d]\w{0,99}")
TAKEN = (
    *("loss", "type", "epoch", "step", "lr", "samples_per_second", "workers"),
    *("waited_for", "communication_share", "straggler_share", "bytes_exchanged"),
    *("noise_scale", "own_metrics", "speeds", "shares", "at"),
)
"""Names of other fields of a record."""


def outputs(model: nn.Module, inputs: Nested, precision: Precision) -> Any:
    """What the model makes of the inputs; of bf16, float32 if it is a tensor."""
    if precision != "bf16":
        with dtypes.default(dtypes.of(precision)):
            return nested.call(model, inputs)
    (_, first), *_ = nested.leaves(inputs)
    with torch.autocast(first.device.type, torch.bfloat16):
        found = nested.call(model, inputs)
    return found.float() if isinstance(found, Tensor) else found


class Objective(nn.Module):
    """A loss and metrics, summed over targets.

    | task | outputs | targets |
    |---|---|---|
    | classification | [b, classes] | int64 [b] |
    | next-token | [b, t, tokens] | int64 [b, t] |
    | regression | [b, values] | floats [b, values] |
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossRecipe,
        function: Callable[..., Any] | None = None,
        metrics: tuple[Metric, ...] | None = None,
        precision: Precision = "float32",
    ) -> None:
        """`function` is the loss if that is the user's own, `metrics` what it measures.

        None: it may measure anything, and what it did is then here. An empty tuple: the
        usual metric of the outputs.
        """
        super().__init__()
        self._precision = precision
        self.model = model
        self._loss, self._function = loss, function
        self.metrics = metrics

    def forward(self, inputs: Nested, targets: Tensor | Mixed) -> tuple[Tensor, Tensor]:
        """Inputs [b, ...] and targets -> summed loss [], cells of the metrics [c].

        A micro-batch of no samples has loss 0 and gradient 0 for every parameter, so
        that its owner takes part in the exchange like everyone else.
        """
        if len(targets) == 0:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nothing = torch.stack([(p * 0).sum() for p in trained])
            return nothing.sum(), torch.zeros(num_cells(self.metrics or ()))
        found = outputs(self.model, inputs, self._precision)
        with dtypes.default(dtypes.of(self._precision)):
            return self.measure(found, targets)

    def measure(self, outputs: Any, targets: Tensor | Mixed) -> tuple[Tensor, Tensor]:
        """Outputs and targets -> summed loss [], cells of the metrics [c]."""
        if isinstance(targets, Mixed):
            assert isinstance(self._loss, CrossEntropy)
            return _mixed_cross_entropy(outputs, targets, self._loss.label_smoothing)
        match self._loss:
            case CrossEntropy(label_smoothing=smoothing):
                return _cross_entropy(outputs, targets, smoothing)
            case SquaredError():
                error = outputs - targets
                return error.square().sum() / 2, error.detach().abs().sum().view(1)
            case CustomLoss(function=name):
                try:
                    return self._own(outputs, targets)
                except OwnCodeError as error:
                    who = capital(title(name, "loss"))
                    raise OwnCodeError(f"{who}: {error}") from error.__cause__

    def _own(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Raises OwnCodeError."""
        assert self._function is not None
        found = self._function(outputs, targets)
        is_pair = isinstance(found, tuple) and len(found) == 2
        loss, measured = found if is_pair else (found, None)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (len(targets),)):
            raise OwnCodeError(
                "a loss function returns the sum over samples, a tensor [], or their "
                f"losses [{len(targets)}], alone or with a dictionary of metrics; "
                f"received {_describe(found)}."
            )
        metrics = read_metrics(measured) if is_pair else {}
        names = tuple(metrics)
        if self.metrics is None:
            self.metrics = names
        if names != self.metrics:
            raise OwnCodeError(
                "a loss function measures the same in every call; at first that was "
                f"{_listed(self.metrics)}, now it is {_listed(names)}."
            )
        cells = [cell for of in metrics.values() for cell in of]
        return loss.sum(), torch.stack(cells or [_usual_metric(outputs, targets)])


def num_cells(metrics: Sequence[Metric]) -> int:
    """Without own metrics, there is the one of the task."""
    return sum(1 + metric.has_count for metric in metrics) or 1


def read_metrics(measured: Any) -> dict[Metric, list[Tensor]]:
    """`{name: sum}` or `{name: (sum, count)}` -> float64 cells []; OwnCodeError."""
    if not isinstance(measured, Mapping) or not 0 < len(measured) <= MOST_METRICS:
        raise OwnCodeError(
            f"metrics are a dictionary of 1 to {MOST_METRICS}, each `name: sum` or "
            f"`name: (sum, count)`; received {_describe(measured)}."
        )
    return {
        Metric(_checked(name), isinstance(value, tuple)): _cells(name, value)
        for name, value in measured.items()
    }


def _checked(name: Any) -> str:
    if isinstance(name, str) and WORD.fullmatch(name) and name not in TAKEN:
        return name
    raise OwnCodeError(
        "the name of a metric is a word of letters, digits and underscores that no "
        f"other field of a record has; received {name!r}."
    )


def _cells(name: str, value: Any) -> list[Tensor]:
    parts = value if isinstance(value, tuple) else (value,)
    try:
        if len(parts) > 2:
            raise ValueError
        return [torch.as_tensor(part).detach().sum().double() for part in parts]
    except (TypeError, ValueError, RuntimeError):
        raise OwnCodeError(
            f"the metric `{name}` is a sum over targets, or such a sum and a count, "
            f"`(sum, count)`; received {_describe(value)}."
        ) from None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_describe, value))})"
    return f"{value!r}"[:100]


def _listed(metrics: Sequence[Metric]) -> str:
    return ", ".join(f"`{m.name}`" + " (counted)" * m.has_count for m in metrics) or (
        "nothing"
    )


def _cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    logits, targets = logits.flatten(0, -2), targets.flatten()
    loss = functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=label_smoothing
    )
    right = logits.detach().argmax(dim=1) == targets
    return loss, right.sum(dim=0, keepdim=True)


def _mixed_cross_entropy(
    logits: Tensor, targets: Mixed, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """The loss of both classes by their shares; right is who has the larger share."""
    first, second = (
        functional.cross_entropy(
            logits, classes, reduction="none", label_smoothing=label_smoothing
        )
        for classes in (targets.first, targets.second)
    )
    loss = torch.lerp(second, first, targets.share).sum()
    right = logits.detach().argmax(dim=1) == targets.first
    return loss, right.sum(dim=0, keepdim=True)


def _usual_metric(outputs: Any, targets: Tensor) -> Tensor:
    """Right answers, or absolute error, whichever the shapes allow."""
    if isinstance(outputs, Tensor):
        if not targets.is_floating_point() and outputs.shape[:-1] == targets.shape:
            return (outputs.detach().argmax(dim=-1) == targets).sum()
        if targets.is_floating_point() and outputs.shape == targets.shape:
            return (outputs.detach() - targets).abs().sum()
    raise OwnCodeError(
        "what to measure besides the loss is unknown for these outputs: return "
        "`(loss, {name: sum over targets})`."
    )
