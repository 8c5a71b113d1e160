"""Layers whose passes cost less than torch's own, with the same meaning."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from samestep.kernels import trace


Sink = Callable[[nn.Parameter], Tensor | None]
"""Returns where a parameter's gradient is to be written; None: leave it in `grad`."""


class Linear(nn.Linear):
    """`nn.Linear` that can write its gradients to where they are exchanged.

    The product itself goes there, without a temporary of the weight's size. The
    exchange sets `gradient_sink`; it returns None for a parameter that this pass has
    already reached, whose gradient must be added.
    """

    gradient_sink: Sink | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if not self._has_sink():
            return functional.linear(inputs, self.weight, self.bias)
        return self._apply_with(inputs, activated=False, mask=None)

    def activate(self, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """Compute `relu(self(inputs)) * mask` as one node of autograd's graph.

        The mask [b, out_features] has zeros and one positive value, as those of
        `dropout_masks` do.
        """
        if not self._has_sink():
            outputs = functional.relu(self(inputs))
            return outputs if mask is None else outputs * mask
        return self._apply_with(inputs, activated=True, mask=mask)

    def _has_sink(self) -> bool:
        """Return whether this pass can write its gradients.

        It cannot under autocast, where products are of another type, nor in compiled
        or recorded code, which returns its gradients.
        """
        if torch.compiler.is_compiling() or trace.is_recording():
            return False
        if self.gradient_sink is None or not torch.is_grad_enabled():
            return False
        return not torch.is_autocast_enabled("cpu")

    def _apply_with(
        self, inputs: Tensor, activated: bool, mask: Tensor | None
    ) -> Tensor:
        rows = inputs if inputs.dim() == 2 else inputs.flatten(0, -2)
        outputs: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            rows, self.weight, self.bias, self.gradient_sink, activated, mask
        )
        return outputs if rows is inputs else outputs.view(*inputs.shape[:-1], -1)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter,
        sink: Sink,
        activated: bool,
        mask: Tensor | None,
    ) -> Tensor:
        outputs = torch.addmm(bias, inputs, weight.t())
        if activated:
            outputs.relu_()
        if mask is not None:
            outputs.mul_(mask)
        ctx.saved = inputs, outputs if activated else None, mask
        ctx.weight, ctx.bias, ctx.sink = weight, bias, sink
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, outputs, mask = ctx.saved
        del ctx.saved
        if outputs is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, outputs, 0)
        if mask is not None:
            gradient.mul_(mask)
        to_inputs = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        to_bias = to_weight = None
        if ctx.needs_input_grad[2]:
            place = ctx.sink(ctx.bias)
            total = torch.sum(gradient, 0, out=place)
            to_bias = total if place is None else None
        if ctx.needs_input_grad[1]:
            place = ctx.sink(ctx.weight)
            product = torch.mm(gradient.t(), inputs, out=place)
            to_weight = product if place is None else None
        return to_inputs, to_weight, to_bias, None, None, None


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that computes with the channels innermost.

    On CPUs such a convolution, and the pooling and norms after it, take about half the
    time. The parameters keep torch's usual order, as they lie in one vector.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Map [b, c, h, w] to [b, out_channels, h', w'], channels last."""
        if trace.is_recording():  # kernels have a layout of their own
            return super().forward(images)
        # `to` also sets the strides of a single channel, where `contiguous` does not.
        images, weight = (
            tensor.to(memory_format=torch.channels_last)
            for tensor in (images, self.weight)
        )
        out: Tensor = self._conv_forward(images, weight, self.bias)
        return out


class Layers(nn.ModuleList):
    """(linear -> (norm) -> ReLU -> dropout) for each hidden layer -> linear."""

    def __init__(
        self,
        widths: Sequence[int],
        dropout: float,
        make: Callable[[int, int], Linear] = Linear,
    ) -> None:
        super().__init__(make(*ends) for ends in pairwise(widths))
        self._widths, self._dropout = list(widths[1:-1]), dropout

    def forward(self, inputs: Tensor, norms: nn.ModuleList | None = None) -> Tensor:
        """Map [b, widths[0]] to [b, widths[-1]]."""
        masks: list[Tensor] | list[None] = [None] * len(self._widths)
        if self.training and self._dropout:
            size, device = len(inputs), inputs.device
            masks = dropout_masks(self._dropout, size, self._widths, device)
        *hidden, last = self
        for index, (layer, mask) in enumerate(zip(hidden, masks, strict=True)):
            assert isinstance(layer, Linear)
            if norms:
                inputs = functional.relu(norms[index](layer(inputs)))
                inputs = inputs if mask is None else inputs * mask
            else:
                inputs = layer.activate(inputs, mask)
        outputs: Tensor = last(inputs)
        return outputs


def dropout_masks(
    probability: float, batch: int, widths: list[int], device: torch.device
) -> list[Tensor]:
    """Draw masks [batch, width] with one random byte per element instead of 64 bits.

    The probability is rounded to a multiple of 1/256; what is kept is scaled by the
    inverse of the true probability, so the expectation is exact. The bytes come from
    the device's default generator, for all masks in one draw.
    """
    if trace.is_recording():  # a program draws from counters of its own
        ones = [torch.ones(batch, width, device=device) for width in widths]
        return [functional.dropout(one, probability) for one in ones]
    dropped = round(probability * 256)
    total = batch * sum(widths)
    words = torch.empty(-(-total // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None)  # all 64 bits; the default range spares the sign
    mask = words.view(torch.uint8)[:total].float()
    # A byte of at least `dropped` keeps: (byte - dropped + 1) is then at least 1.
    mask.sub_(dropped - 1).clamp_(0, 1).mul_(256 / (256 - dropped))
    parts = torch.split(mask, [batch * width for width in widths])
    return [part.view(batch, width) for part, width in zip(parts, widths, strict=True)]
