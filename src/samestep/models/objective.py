"""The model together with its loss: the forward pass of a micro-batch."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.config.data import PADDING
from samestep.config.model import CrossEntropy, CustomLoss, LossRecipe, SquaredError
from samestep.config.recipe import Precision
from samestep.core.metric import COUNTED, MOST_METRICS, Metric, num_cells
from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.pytree import Nested
from samestep.errors import OwnCodeError
from samestep.output.schema import Result, Step
from samestep.state import dtypes
from samestep.user_code.references import capital, title


WORD = re.compile(r"[^\W\d]\w{0,99}")
TESTED = [name for name in Result.model_fields if name.startswith("test_")]
TAKEN = {"type", *Step.model_fields, *(n.removeprefix("test_") for n in TESTED)}
TAKEN -= {"accuracy"}
"""Names of the other fields of a record."""


def outputs(model: nn.Module, inputs: Nested, precision: Precision) -> Any:
    """Return the model's outputs; with bf16, converted to float32 if it is a tensor."""
    if precision != "bf16":
        with dtypes.default(dtypes.of(precision)):
            return pytree.call(model, inputs)
    (_, first), *_ = pytree.leaves(inputs)
    with torch.autocast(first.device.type, torch.bfloat16):
        results = pytree.call(model, inputs)
    return results.float() if isinstance(results, Tensor) else results


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
        targets_per_sample: int | None = None,
    ) -> None:
        """Combine a model and a loss; `function` is the loss if it is the user's own.

        `metrics` are what the function measures; with None it may measure anything, and
        the first call sets `self.metrics`. If it measures nothing, or only COUNTED, the
        usual metric of the outputs is added. A loss that returns no count relies on all
        samples having `targets_per_sample`.
        """
        super().__init__()
        self._precision, self._per_sample = precision, targets_per_sample
        self.model = model
        self.loss, self._function = loss, function
        self.metrics = built_in(loss) if function is None else metrics

    def forward(self, inputs: Nested, targets: Tensor | Mixed) -> tuple[Tensor, Tensor]:
        """Compute the summed loss [] and the cells of the metrics [c] of a micro-batch.

        Inputs are [b, ...]. A micro-batch of no samples has loss 0 and gradient 0 for
        every parameter, so that its owner takes part in the exchange like all others.
        """
        if len(targets) == 0:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nothing = torch.stack([(p * 0).sum() for p in trained])
            return nothing.sum(), torch.zeros(num_cells(self.metrics or ()))
        self._check_number(targets)
        results = outputs(self.model, inputs, self._precision)
        with dtypes.default(dtypes.of(self._precision)):
            return self.measure(results, targets)

    def _check_number(self, targets: Tensor | Mixed) -> None:
        """Raise OwnCodeError if a loss without a count gets more or fewer targets."""
        if self._per_sample is None or isinstance(targets, Mixed):
            return
        if targets[0].numel() != self._per_sample and COUNTED not in (
            self.metrics or ()
        ):
            raise OwnCodeError(
                "A loss is divided by the number of targets, and samples must have "
                f"equally many: first there were {self._per_sample}, now there are "
                f"{targets[0].numel()} in each. Where batches are padded to lengths of "
                "their own, return `(sum, count)`, or set `loss.ignore_index`."
            )

    def measure(self, outputs: Any, targets: Tensor | Mixed) -> tuple[Tensor, Tensor]:
        """Compute the summed loss [] and the cells of the metrics [c] of outputs."""
        if isinstance(targets, Mixed):
            assert isinstance(self.loss, CrossEntropy)
            return _mixed_cross_entropy(outputs, targets, self.loss.label_smoothing)
        match self.loss:
            case CrossEntropy():
                return _cross_entropy(outputs, targets, self.loss)
            case SquaredError():
                error = outputs - targets
                return error.square().sum() / 2, error.detach().abs().sum().view(1)
            case CustomLoss(function=name):
                try:
                    return self._own(outputs, targets)
                except OwnCodeError as error:
                    who = capital(title(name, "loss"))
                    raise OwnCodeError(f"{who}: {error}") from error.__cause__

    def summands(self, outputs: Any, targets: Tensor) -> list[Any]:
        """Return the loss of outputs [] and the cells of the metrics, to be recorded.

        They are tensors [], or numbers; for a loss of the user's own. Raises
        OwnCodeError.
        """
        loss, cells = self._summands(outputs, targets)
        summed = [c.detach().sum() if isinstance(c, Tensor) else c for c in cells]
        return [loss.sum(), *summed]

    def _own(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Call the user's own loss. Raises OwnCodeError."""
        loss, cells = self._summands(outputs, targets)
        if self.metrics and self.metrics[0] == COUNTED:
            cells[1] = _count(cells[1])
        return loss.sum(), torch.stack([_summed(cell) for cell in cells])

    def _summands(self, outputs: Any, targets: Tensor) -> tuple[Tensor, list[Any]]:
        """Return what the user's own loss returned: a loss, and what cells sum.

        Raises OwnCodeError.
        """
        assert self._function is not None
        returned = self._function(outputs, targets)
        loss, count, measured = _parts(returned)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (len(targets),)):
            raise OwnCodeError(
                "a loss function returns the sum over samples, a tensor [], or their "
                f"losses [{len(targets)}], alone, with the count that it is divided "
                "by, with a dictionary of metrics, or with both; received "
                f"{_describe(returned)}."
            )
        metrics = {} if measured is None else _named(measured)
        if count is not None:
            metrics = {COUNTED: (loss, count), **metrics}
        names = tuple(metrics)
        if self.metrics is None:
            self.metrics = names
        if names != self.metrics:
            raise OwnCodeError(
                "a loss function measures the same in every call; at first that was "
                f"{_listed(self.metrics)}, now it is {_listed(names)}."
            )
        cells = [cell for of in metrics.values() for cell in of]
        if names in ((), (COUNTED,)):
            cells += _usual_metric(outputs, targets)[: 1 + len(names)]
        return loss, cells


def built_in(loss: LossRecipe) -> tuple[Metric, ...]:
    """Return what a built-in loss measures besides the usual metric."""
    ignores = isinstance(loss, CrossEntropy) and loss.ignore_index is not None
    return (COUNTED,) if ignores else ()


def without_smoothing(loss: LossRecipe) -> LossRecipe:
    """Return the loss of an evaluation: without label smoothing, losses compare."""
    if isinstance(loss, CrossEntropy):
        return CrossEntropy(ignore_index=loss.ignore_index)
    return loss


def ignored_label(loss: LossRecipe) -> int:
    """Return the target that a built-in loss leaves out."""
    ignored = loss.ignore_index if isinstance(loss, CrossEntropy) else None
    return PADDING if ignored is None else ignored  # no other label is negative


def _parts(returned: Any) -> tuple[Any, Any, Any]:
    """Split what a loss function returned into loss, count and metrics, or None."""
    match returned:
        case tuple((loss, count, measured)):
            return loss, count, measured
        case tuple((loss, Tensor() | float() | int() as count)):
            return loss, count, None
        case tuple((loss, measured)):
            return loss, None, measured
    return returned, None, None


def _count(value: Any) -> Tensor:
    """Return what the sum of a loss is divided by, float64 []. Raises OwnCodeError."""
    try:
        count = torch.as_tensor(value).detach().sum().double()
    except (TypeError, ValueError, RuntimeError):
        count = torch.tensor(float("nan"))
    if not 0 <= count < float("inf"):
        raise OwnCodeError(
            "the count of a loss is the number of targets that it is over, or the sum "
            f"of their weights, and not negative; received {_describe(value)}."
        )
    return count


def _named(measured: Any) -> dict[Metric, tuple[Any, ...]]:
    """Return what the cells of metrics sum. Raises OwnCodeError."""
    if not isinstance(measured, Mapping) or not 0 < len(measured) <= MOST_METRICS:
        raise OwnCodeError(
            f"metrics are a dictionary of 1 to {MOST_METRICS}, each `name: sum` or "
            f"`name: (sum, count)`; received {_describe(measured)}."
        )
    return {
        Metric(_checked(name), isinstance(value, tuple)): _summed_parts(name, value)
        for name, value in measured.items()
    }


def _checked(name: Any) -> str:
    if isinstance(name, str) and WORD.fullmatch(name) and name not in TAKEN:
        return name
    raise OwnCodeError(
        "the name of a metric is a word of letters, digits and underscores that no "
        f"other field of a record has; received {name!r}."
    )


def _summed_parts(name: str, value: Any) -> tuple[Any, ...]:
    """Return a sum, or a sum and a count. Raises OwnCodeError."""
    parts = value if isinstance(value, tuple) else (value,)
    try:
        if len(parts) > 2:
            raise ValueError
        for part in parts:
            torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError):
        raise OwnCodeError(
            f"the metric `{name}` is a sum over targets, or such a sum and a count, "
            f"`(sum, count)`; received {_describe(value)}."
        ) from None
    return parts


def _summed(part: Any) -> Tensor:
    """Return the sum of a cell's numbers, float64 []."""
    return torch.as_tensor(part).detach().sum().double()


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
    logits: Tensor, targets: Tensor, recipe: CrossEntropy
) -> tuple[Tensor, Tensor]:
    logits, targets = logits.flatten(0, -2), targets.flatten()
    loss = functional.cross_entropy(
        logits,
        targets,
        ignore_index=ignored_label(recipe),
        reduction="sum",
        label_smoothing=recipe.label_smoothing,
    )
    right = logits.detach().argmax(dim=1) == targets
    if recipe.ignore_index is None:
        return loss, right.sum(dim=0, keepdim=True)
    is_valid = targets != ignored_label(recipe)
    valid, right = is_valid.sum(), (right & is_valid).sum()
    return loss, torch.stack([loss.detach().double(), valid, right, valid])


def _mixed_cross_entropy(
    logits: Tensor, targets: Mixed, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Compute the loss of both classes by their shares, and the right answers.

    An answer is right if it is the class of the larger share.
    """
    first, second = (
        functional.cross_entropy(
            logits, classes, reduction="none", label_smoothing=label_smoothing
        )
        for classes in (targets.first, targets.second)
    )
    loss = torch.lerp(second, first, targets.share).sum()
    right = logits.detach().argmax(dim=1) == targets.first
    return loss, right.sum(dim=0, keepdim=True)


def _usual_metric(outputs: Any, targets: Tensor) -> list[Any]:
    """Return right answers or absolute errors, as the shapes allow, and a count.

    A negative class cannot be right, and is not counted.
    """
    if isinstance(outputs, Tensor):
        if not targets.is_floating_point() and outputs.shape[:-1] == targets.shape:
            right = outputs.detach().argmax(dim=-1) == targets
            return [right, targets >= 0]
        if targets.is_floating_point() and outputs.shape == targets.shape:
            error = (outputs.detach() - targets).abs()
            return [error, len(targets)]
    raise OwnCodeError(
        "what to measure besides the loss is unknown for these outputs: return "
        "`(loss, {name: sum over targets})`."
    )
