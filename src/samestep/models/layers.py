"""Layers whose passes cost less than torch's own, with the same meaning."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional


Sink = Callable[[nn.Parameter], Tensor | None]
"""Where the gradient of a parameter is to be written, or None to have it returned."""


class Linear(nn.Linear):
    """`nn.Linear` that can write its gradients to where they are exchanged.

    The product itself goes there, without a temporary of the weight's size. Only a pass
    through the module once per backward may do so: a sink is asked in every backward.
    """

    sink: Sink | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """[b, in_features] -> [b, out_features]."""
        if self.sink is None or not torch.is_grad_enabled():
            return functional.linear(inputs, self.weight, self.bias)
        outputs: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            inputs, self.weight, self.bias, self.sink
        )
        return outputs


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter, sink: Sink
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.weight, ctx.bias, ctx.sink = weight, bias, sink
        return torch.addmm(bias, inputs, weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        to_inputs = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        place = ctx.sink(ctx.bias)
        to_bias = torch.sum(gradient, 0, out=place)
        place_weight = ctx.sink(ctx.weight)
        to_weight = torch.mm(gradient.t(), inputs, out=place_weight)
        return (
            to_inputs,
            to_weight if place_weight is None else None,
            to_bias if place is None else None,
            None,
        )


class ReluDropout(nn.Module):
    """ReLU, then dropout with one random byte per element instead of 64 bits.

    The probability is rounded to a multiple of 1/256; what is kept is scaled by the
    inverse of the true probability, so the expectation is exact. Bytes come from
    torch's default generator.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.dropped = round(probability * 256)
        """Of 256 byte values, so many drop an element."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Any shape, float32."""
        if not self.training or self.dropped == 0:
            return functional.relu(inputs)
        outputs: Tensor = _ReluDropout.apply(  # type: ignore[no-untyped-call]
            inputs, self.dropped
        )
        return outputs


class _ReluDropout(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, dropped: int) -> Tensor:
        ctx.scale = 256 / (256 - dropped)
        words = torch.empty(-(-inputs.numel() // 8), dtype=torch.int64)
        words.random_(-(2**63), None)  # all 64 bits; the default range spares the sign
        mask = words.view(torch.uint8)[: inputs.numel()].float().view_as(inputs)
        # A byte of at least `dropped` keeps: (byte - dropped + 1) is then at least 1.
        mask.sub_(dropped - 1).clamp_(0, 1).mul_(ctx.scale)
        outputs = torch.relu(inputs).mul_(mask)
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (outputs,) = ctx.saved_tensors
        through = torch.ops.aten.threshold_backward(gradients[0], outputs, 0)
        return through.mul_(ctx.scale), None
