"""Checks of targets, and what is inferred from them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.config.data import Task
from samestep.config.model import CrossEntropy, CustomLoss, LossRecipe
from samestep.data.pytree import Shape
from samestep.errors import DataError, OwnCodeError


@dataclass(frozen=True)
class Labels:
    """The integer targets that a loss accepts."""

    are_checked: bool = True
    """Whether labels out of range are refused: not for the user's own loss function."""
    ignored: int | None = None
    """A label that does not count in the loss."""

    @classmethod
    def of(cls, loss: LossRecipe) -> "Labels":
        """Return the labels that a recipe's loss accepts."""
        return cls(
            not isinstance(loss, CustomLoss),
            loss.ignore_index if isinstance(loss, CrossEntropy) else None,
        )

    def count(self, targets: Tensor) -> Tensor:
        """Return for each target whether it counts in the loss, as booleans."""
        if self.ignored is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets != self.ignored


ALL_LABELS = Labels()
"""They are checked, and all of them count."""


@dataclass(frozen=True)
class DataInfo:
    """The properties that all splits of a data set share."""

    inputs: Shape
    """The shape of one sample: [channels, height, width], [values] or [tokens].

    Where a model takes several inputs, a dictionary or tuple of such shapes.
    """
    outputs: int
    """Classes, different tokens, or values to predict."""
    task: Task
    targets_per_sample: int = 1
    labels: Labels = ALL_LABELS


def task_of(targets: Tensor, who: str) -> Task:
    """Infer the task from the targets of one sample [1, ...]. Raises OwnCodeError."""
    if targets.is_floating_point():
        return "regression"
    if targets.dim() == 1:
        return "classification"
    if targets.dim() == 2 and targets.shape[1] > 1:
        return "next-token"
    raise OwnCodeError(
        f"{who}: integer targets are classes [n] or next tokens [n, t]; they have the "
        f"shape [n, {', '.join(map(str, targets.shape[1:]))}]. Reshape them, or say "
        "`task` in the section [data]."
    )


def shaped(targets: Tensor, task: Task) -> Tensor:
    """Return targets [b, ...] in the shape and type that the task's loss takes."""
    if task == "regression":
        return targets.reshape(len(targets), -1) if targets.dim() < 2 else targets
    targets = targets.long()
    return targets.flatten() if task == "classification" else targets


def check_labels(targets: Tensor, info: DataInfo, who: str, indices: Tensor) -> None:
    """Raise DataError for a label out of range.

    `indices` int64 [b] are the numbers of the samples in the split `who`.
    """
    labels = info.labels
    if info.task == "regression" or not labels.are_checked:
        return
    is_wrong = (targets < 0) | (targets >= info.outputs)
    wrong = (is_wrong & labels.count(targets)).nonzero()
    if len(wrong):
        first = wrong[0].tolist()
        label = int(targets[tuple(first)])
        is_marker = labels.ignored is None and label < 0
        hint = f" If such targets do not count, set `loss.ignore_index = {label}`."
        raise DataError(
            f"Labels are from 0 to {info.outputs - 1}, by `data.outputs` or by the "
            f"largest in `train`; sample {int(indices[first[0]])} of {who} has {label}."
            f"{hint if is_marker else ''}"
        )


def narrow(values: Tensor) -> Tensor:
    """Convert integers to int64, except for uint8; floats and booleans stay."""
    stays = values.is_floating_point() or values.dtype in (torch.uint8, torch.bool)
    return values if stays else values.long()
