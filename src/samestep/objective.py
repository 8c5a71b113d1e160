"""The model together with its loss: what a micro-batch goes through."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.errors import OwnCodeError
from samestep.ingredients import CrossEntropy, CustomLoss, LossRecipe, SquaredError


Task = Literal["classification", "next-token", "regression"]
Precision = Literal["float32", "bf16"]
METRICS: dict[Task, str] = {
    "classification": "accuracy",
    "next-token": "accuracy",
    "regression": "absolute_error",
}
"""What is measured besides the loss: means over all targets."""


def outputs(model: nn.Module, inputs: Tensor, precision: Precision) -> Any:
    """What the model makes of the inputs, in float32 if it is a tensor."""
    if precision == "float32":
        return model(inputs)
    with torch.autocast(inputs.device.type, torch.bfloat16):
        found = model(inputs)
    return found.float() if isinstance(found, Tensor) else found


class Objective(nn.Module):
    """A loss and a metric, summed over targets.

    | task | outputs | targets |
    |---|---|---|
    | classification | [b, classes] | int64 [b] |
    | next-token | [b, t, tokens] | int64 [b, t] |
    | regression | [b, values] | float32 [b, values] |
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossRecipe,
        function: Callable[..., Any] | None = None,
        precision: Precision = "float32",
    ) -> None:
        """`function` is the loss if that is the user's own."""
        super().__init__()
        self._precision = precision
        self.model = model
        self._loss, self._function = loss, function
        self.metric: str | None = None
        """The name that such a function gave to what it measured."""

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [b, ...] and targets -> summed loss [], summed metric [].

        A micro-batch of no samples has loss 0 and gradient 0 for every parameter, so
        that its owner takes part in the exchange like everyone else.
        """
        if len(targets) == 0:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            nothing = torch.stack([(p * 0).sum() for p in trained])
            return nothing.sum(), torch.zeros((), dtype=torch.int64)
        return self.measure(outputs(self.model, inputs, self._precision), targets)

    def measure(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets -> summed loss [], summed metric []."""
        match self._loss:
            case CrossEntropy(label_smoothing=smoothing):
                return _cross_entropy(outputs, targets, smoothing)
            case SquaredError():
                error = outputs - targets
                return error.square().sum() / 2, error.detach().abs().sum()
            case CustomLoss():
                return self._own(outputs, targets)

    def _own(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Raises OwnCodeError."""
        assert self._function is not None
        found = self._function(outputs, targets)
        loss, metrics = found if isinstance(found, tuple) else (found, None)
        if not isinstance(loss, Tensor) or loss.shape not in ((), (len(targets),)):
            shape = (
                list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            )
            raise OwnCodeError(
                "A loss function returns the sum over samples, a tensor [], or their "
                f"losses [{len(targets)}], alone or with a dictionary of one metric; "
                f"received {shape}."
            )
        if metrics is None:
            return loss.sum(), _usual_metric(outputs, targets)
        if not isinstance(metrics, Mapping) or len(metrics) != 1:
            raise OwnCodeError(
                "A loss function returns at most one metric, as `{name: sum over "
                f"targets}}`; received {metrics!r}."
            )
        ((self.metric, value),) = metrics.items()
        return loss.sum(), torch.as_tensor(value).detach().sum()


def _cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    logits, targets = logits.flatten(0, -2), targets.flatten()
    loss = functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=label_smoothing
    )
    return loss, (logits.detach().argmax(dim=1) == targets).sum()


def _usual_metric(outputs: Any, targets: Tensor) -> Tensor:
    """Right answers, or absolute error, whichever the shapes allow."""
    if isinstance(outputs, Tensor):
        if not targets.is_floating_point() and outputs.shape[:-1] == targets.shape:
            return (outputs.detach().argmax(dim=-1) == targets).sum()
        if targets.is_floating_point() and outputs.shape == targets.shape:
            return (outputs.detach() - targets).abs().sum()
    raise OwnCodeError(
        "What to measure besides the loss is unknown for these outputs: return "
        "`(loss, {name: sum over targets})` from the loss function."
    )
