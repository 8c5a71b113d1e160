"""Forward and backward passes of whole layers, for the table of `roofline.py`."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from accuracy import Attention
from torch import nn

from samestep.kernels.execution import Execution
from samestep.kernels.interface import Kernels, OpKind
from samestep.kernels.lower import lower
from samestep.kernels.values import LossOp
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


TOKENS, WIDTH = 128, 128
"""Positions and features of attention, which is causal, of 4 heads."""
STEPS, INPUTS, HIDDEN = 64, 64, 128
"""Steps, inputs and states of an LSTM."""


class Mixing(nn.Module):
    """Attention over products of the inputs, which give it a backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.attention = nn.Linear(WIDTH, 3 * WIDTH), Attention()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [b, t, width] to [b, t * width]."""
        return torch.as_tensor(self.attention(self.mix(inputs)).flatten(1))


class Recurrent(nn.Module):
    """An LSTM, and its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(INPUTS, HIDDEN, batch_first=True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [b, t, inputs] to [b, hidden]."""
        return torch.as_tensor(self.lstm(inputs)[0][:, -1])


def layer_passes(
    kernels: Kernels,
) -> Iterator[tuple[tuple[str, ...], float, Callable[[], object]]]:
    """Yield names, operations, and what runs them, of attention and of an LSTM.

    Of 64 samples, by samestep and by torch; attention with its products before.
    The inputs have no gradient; causal attention counts half of all pairs.
    """
    gates = 2.0 * STEPS * 4 * HIDDEN
    products, pairs = 6.0 * TOKENS * WIDTH**2, 2.0 * TOKENS**2 * WIDTH
    for name, module, shape, forward, backward in (
        (
            f"{TOKENS} x {WIDTH}, causal attention and its products",
            *(Mixing(), (TOKENS, WIDTH), products + pairs, products + 2.5 * pairs),
        ),
        (
            f"{STEPS} steps, {INPUTS} -> {HIDDEN}, LSTM",
            *(Recurrent(), (STEPS, INPUTS), gates * (INPUTS + HIDDEN)),
            gates * (INPUTS + 2 * HIDDEN),
        ),
    ):
        works = 64 * forward, 64 * (forward + backward)
        own, others = (
            program_passes(kernels, module, shape),
            torch_passes(module, shape),
        )
        for form, work in zip(own, works, strict=True):
            yield (name, "64", form, "samestep"), work, own[form]
            yield (name, "64", form, "torch"), work, others[form]


def program_passes(
    kernels: Kernels, module: nn.Module, shape: tuple[int, ...]
) -> dict[str, Callable[[], object]]:
    """Return what runs a module's forward pass, and both passes, as a program."""
    flat, loss = Flat(module), LossOp(OpKind.SQUARED_ERROR)
    program = lower(module, shape, places_of(flat), loss)
    execution = Execution(program, kernels, 64, 2)
    inputs, parameters = torch.randn(64, *shape), torch.zeros(flat.size)
    flat.bind(parameters, write=True)
    execution.bind(parameters=parameters, inputs=inputs.flatten(1))
    execution.bind(targets=torch.randn_like(module(inputs)))
    execution.bind_micro_batches(torch.tensor([0, 32, 64]), torch.tensor([0, 1]))
    execution.bind_slots([torch.zeros(flat.size)], flat.size)
    execution.run(0, program.num_loads)
    run = partial(execution.run, program.num_loads)
    return {
        "forward": partial(run, program.num_loads + program.num_forward),
        "forward and backward": run,
    }


def torch_passes(
    module: nn.Module, shape: tuple[int, ...]
) -> dict[str, Callable[[], object]]:
    """Return the same by torch."""
    inputs, parameters = torch.randn(64, *shape), list(module.parameters())

    def both() -> object:
        outputs = module(inputs)
        return torch.autograd.grad(outputs, parameters, torch.ones_like(outputs))

    return {
        "forward": torch.no_grad()(partial(module, inputs)),
        "forward and backward": both,
    }
