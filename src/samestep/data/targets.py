"""What all splits of a data set share, and what is found from their targets."""

from dataclasses import dataclass

import torch
from torch import Tensor

from samestep.config.data import Task
from samestep.config.model import CrossEntropy, CustomLoss, LossRecipe
from samestep.data.pytree import Shape
from samestep.errors import DataError, OwnCodeError


@dataclass(frozen=True)
class Labels:
    """Which integer targets the loss takes."""

    are_checked: bool = True
    """Not for a loss of the user's own, which knows what it takes."""
    ignored: int | None = None
    """One that does not count."""

    @classmethod
    def of(cls, loss: LossRecipe) -> "Labels":
        """Those that a recipe's loss takes."""
        return cls(
            not isinstance(loss, CustomLoss),
            loss.ignore_index if isinstance(loss, CrossEntropy) else None,
        )

    def count(self, targets: Tensor) -> Tensor:
        """Whether each of the targets counts, of their shape."""
        if self.ignored is None:
            return torch.ones_like(targets, dtype=torch.bool)
        return targets != self.ignored


ALL_LABELS = Labels()
"""Checked, and all of them count."""


@dataclass(frozen=True)
class DataInfo:
    """What all splits share."""

    inputs: Shape
    outputs: int
    task: Task
    targets_per_sample: int
    labels: Labels = ALL_LABELS


def task_of(targets: Tensor, who: str) -> Task:
    """Of the targets of one sample, [1, ...]. Raises OwnCodeError."""
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
    """[b, ...] -> what the task's loss takes, numbers to predict of any type."""
    if task == "regression":
        return targets.reshape(len(targets), -1) if targets.dim() < 2 else targets
    targets = targets.long()
    return targets.flatten() if task == "classification" else targets


def check_labels(
    targets: Tensor,
    task: Task,
    outputs: int | None,
    who: str,
    indices: Tensor,
    labels: Labels = ALL_LABELS,
) -> None:
    """Raises DataError for a label out of range."""
    if task == "regression" or outputs is None or not labels.are_checked:
        return
    is_wrong = (targets < 0) | (targets >= outputs)
    wrong = (is_wrong & labels.count(targets)).nonzero()
    if len(wrong):
        first = wrong[0].tolist()
        label = int(targets[tuple(first)])
        hint = f" If it marks what is not to count, say `loss.ignore_index = {label}`."
        raise DataError(
            f"Labels are from 0 to {outputs - 1}, by `data.outputs` or by the largest "
            f"in `train`; sample {int(indices[first[0]])} of {who} has {label}."
            + hint
            * (labels.ignored is None and label < 0)
        )


def narrow(values: Tensor) -> Tensor:
    """Integers -> int64; but uint8, booleans and floats stay."""
    stays = values.is_floating_point() or values.dtype in (torch.uint8, torch.bool)
    return values if stays else values.long()
