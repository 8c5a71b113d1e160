"""Losses as users write them: a function, the shape of outputs, and of targets."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


Loss = Callable[[Any, Tensor], Any]
CLASSES, VALUES = 5, 3
Style = tuple[Loss, tuple[int, ...], tuple[int, ...] | None]


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Focus on samples that are still wrong."""
    each = F.cross_entropy(outputs, targets, reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).sum()


def weighted(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh classes, and divide by the weights."""
    weights = torch.arange(1.0, CLASSES + 1)
    loss = F.cross_entropy(outputs, targets, weight=weights, reduction="sum")
    return loss, weights[targets].sum()


def smoothed_by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
    """Smooth one-hot labels."""
    hot = F.one_hot(targets, CLASSES).float() * 0.9 + 0.02
    return -(hot * F.log_softmax(outputs, dim=-1)).sum()


def elbo(outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Add a reconstruction and a divergence from the normal distribution."""
    mean, log_variance, given = outputs.chunk(3, dim=1)
    squares = F.mse_loss(given, targets, reduction="sum")
    apart = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return squares + 0.1 * apart, {"squares": squares, "apart": apart}


def triplet_within(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare three vectors of every sample."""
    first, second, third = outputs.unbind(1)
    near, far = ((first - v).square().sum(1) for v in (second, third))
    return (near - far + 0.5).clamp(min=0).sum()


def dice(outputs: Tensor, targets: Tensor) -> Tensor:
    """Overlap within every sample."""
    p = torch.sigmoid(outputs)
    both = (p * targets).sum(1)
    return 1 - (2 * both + 1) / (p.sum(1) + targets.sum(1) + 1)


def distribution(outputs: Tensor, targets: Tensor) -> Tensor:
    """Take the likelihood of a normal distribution of its own."""
    normal = torch.distributions.Normal(outputs, torch.exp(0.1 * outputs))
    likelihoods: Tensor = normal.log_prob(targets)  # type: ignore[no-untyped-call]
    return -likelihoods.sum()


def padded(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Leave out positions without a label, and count the others."""
    total = F.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=1, reduction="sum"
    )
    valid = targets != 1
    right = (outputs.argmax(-1) == targets) & valid
    return total, valid.sum(), {"right": (right.sum(), valid.sum())}


def rank(outputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Count labels among the two best answers."""
    own = outputs.gather(1, targets[:, None])
    loss = torch.logsumexp(outputs, 1) - own.squeeze(1)
    return loss, {"second": ((outputs > own).sum(1) < 2).sum()}


def gaussian(outputs: Tensor, targets: Tensor) -> Tensor:
    """Predict a variance, too."""
    mean, raw = outputs.chunk(2, dim=1)
    return F.gaussian_nll_loss(mean, targets, F.softplus(raw), reduction="sum")


ONE = (CLASSES,)
SAME = (VALUES,)
STYLES: dict[str, Style] = {
    "focal": (focal, ONE, None),
    "weighted": (weighted, ONE, None),
    "smoothed by hand": (smoothed_by_hand, ONE, None),
    "smoothed": (
        lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1, reduction="sum"),
        ONE,
        None,
    ),
    "each": (lambda o, t: F.cross_entropy(o, t, reduction="none"), ONE, None),
    "picked": (lambda o, t: -F.log_softmax(o, -1)[torch.arange(len(t)), t], ONE, None),
    "nll": (
        lambda o, t: F.nll_loss(F.log_softmax(o, 1), t, reduction="sum"),
        ONE,
        None,
    ),
    "pixels": (
        lambda o, t: F.cross_entropy(o, t.long(), reduction="none").sum((1, 2)),
        (CLASSES, 2, 3),
        (2, 3),
    ),
    "padded": (padded, (4, CLASSES), (4,)),
    "rank": (rank, ONE, None),
    "shares": (
        lambda o, t: F.kl_div(F.log_softmax(o, 1), t.softmax(1), reduction="sum"),
        SAME,
        SAME,
    ),
    "mse": (lambda o, t: F.mse_loss(o, t, reduction="none").mean(1), SAME, SAME),
    "mean": (lambda o, t: len(t) * F.mse_loss(o, t), SAME, SAME),
    "l1": (lambda o, t: F.l1_loss(o, t, reduction="sum"), SAME, SAME),
    "smooth l1": (
        lambda o, t: F.smooth_l1_loss(o, t, reduction="none", beta=0.5).sum(1),
        SAME,
        SAME,
    ),
    "huber": (lambda o, t: F.huber_loss(o, t, reduction="sum"), SAME, SAME),
    "bce": (
        lambda o, t: F.binary_cross_entropy(
            torch.sigmoid(o), t.sigmoid(), reduction="sum"
        ),
        SAME,
        SAME,
    ),
    "bce of logits": (
        lambda o, t: F.binary_cross_entropy_with_logits(
            o, t, pos_weight=torch.arange(1.0, VALUES + 1), reduction="sum"
        ),
        SAME,
        SAME,
    ),
    "poisson": (
        lambda o, t: F.poisson_nll_loss(o, t.abs(), full=True, reduction="sum"),
        SAME,
        SAME,
    ),
    "gaussian": (gaussian, (2 * VALUES,), SAME),
    "distribution": (distribution, SAME, SAME),
    "elbo": (elbo, (3 * VALUES,), SAME),
    "dice": (dice, SAME, SAME),
    "triplet": (triplet_within, (3, 4), None),
    "quantile": (
        lambda o, t: torch.where(t > o, 0.9 * (t - o), 0.1 * (o - t)).sum(),
        SAME,
        SAME,
    ),
}
"""Targets are classes of samples (None), or of positions (CLASS_TARGETS), or floats."""
CLASS_TARGETS = ("pixels", "padded")


def random_targets(name: str, samples: int) -> Tensor:
    """Draw targets for a loss."""
    _, _, shape = STYLES[name]
    if shape is None or name in CLASS_TARGETS:
        return torch.randint(CLASSES, (samples, *(shape or ())))
    return torch.randn(samples, *shape)
