"""Functions of PyTorch that are replaced while a module is recorded.

They compute the same without looking at numbers to check them, by which data would
decide what is computed, and without changing parts of a tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from samestep.kernels.aten.recurrent_calls import RecurrentCalls
from samestep.kernels.trace import Recorder


@contextmanager
def whole_calls(recorder: Recorder) -> Iterator[None]:
    """Record recurrent layers whole, and losses without checks of their arguments."""
    validates = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        with RecurrentCalls(recorder), _Replaced():
            yield
    finally:
        Distribution.set_default_validate_args(validates)


class _Replaced(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **(kwargs or {}))


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:  # which looks for the largest class
        return functional.one_hot(tensor, num_classes)
    classes = torch.arange(num_classes, device=tensor.device)
    return (tensor.unsqueeze(-1) == classes).long()


def _gaussian_nll(
    input: Tensor,  # noqa: A002
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    variance = torch.as_tensor(var, dtype=input.dtype)
    if variance.dim() == input.dim() - 1 and variance.shape == input.shape[:-1]:
        variance = variance.unsqueeze(-1)
    with torch.no_grad():  # the gradient ignores the bound
        bounded = variance.clamp(min=eps) - variance
    variance = variance + bounded
    loss = 0.5 * (torch.log(variance) + (input - target) ** 2 / variance)
    if full:
        loss = loss + 0.5 * torch.log(torch.tensor(2 * torch.pi))
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.mean()


def _pad(
    x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if mode != "circular":
        return functional.pad(x, pad, mode, value)
    for number in range(len(pad) // 2):  # PyTorch copies parts into new memory
        dim, (before, after) = -1 - number, pad[2 * number : 2 * number + 2]
        index = torch.arange(-before, x.shape[dim] + after) % x.shape[dim]
        x = x.index_select(dim, index)
    return x


def _mean_pool(pool: Callable[..., Tensor], dims: int) -> Callable[..., Tensor]:
    """Return a pooling that is a mean where it gives one value, in any memory order."""
    last = tuple(range(-dims, 0))

    def call(input: Tensor, output_size: Any) -> Tensor:  # noqa: A002
        if output_size in (1, (1,) * dims, [1] * dims):
            return input.mean(last, keepdim=True)
        return pool(input, output_size)

    return call


def _embedding_bag(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if input.dim() != 2 or max_norm or scale_grad_by_freq or padding_idx is not None:
        rest = norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights
        ends = include_last_offset, padding_idx
        return functional.embedding_bag(input, weight, offsets, max_norm, *rest, *ends)
    rows = functional.embedding(input, weight)
    if mode == "max":
        return rows.max(1).values
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    return rows.sum(1) if mode == "sum" else rows.mean(1)


_REPLACED: dict[Any, Any] = {
    functional.adaptive_avg_pool1d: _mean_pool(functional.adaptive_avg_pool1d, 1),
    functional.adaptive_avg_pool2d: _mean_pool(functional.adaptive_avg_pool2d, 2),
    functional.embedding_bag: _embedding_bag,
    functional.gaussian_nll_loss: _gaussian_nll,
    functional.pad: _pad,
    functional.one_hot: _one_hot,
}
