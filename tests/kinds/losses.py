"""Losses of many kinds."""

import os

import numpy as np
import torch
from torch.nn import functional

from kinds.plain import loss


def mean(outputs, targets):
    """What everybody writes elsewhere."""
    return functional.cross_entropy(outputs, targets)


class_loss = torch.nn.CrossEntropyLoss()


def with_dropout(outputs, targets):
    return loss(functional.dropout(outputs, 0.2), targets)


def with_numpy(outputs, targets):
    return loss(outputs * (1 + np.random.rand()), targets)


AVERAGE = {"value": 1.0}


def with_average(outputs, targets):
    """Divided by a running average of itself."""
    total = loss(outputs, targets)
    AVERAGE["value"] = 0.9 * AVERAGE["value"] + 0.1 * float(total.detach())
    return total / AVERAGE["value"]


def by_rank(outputs, targets):
    return loss(outputs, targets) * (1 + int(os.environ.get("RANK", "0")))


def counting(outputs, targets, calls=[]):  # noqa: B006
    """Another weight from the 40th call on."""
    calls.append(None)
    return loss(outputs, targets) * (2 if len(calls) > 40 else 1)
