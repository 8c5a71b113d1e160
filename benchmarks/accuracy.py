"""How far are the kernels of portable arithmetic, and torch's, from exact results?

    python benchmarks/accuracy.py

Products, sums and layers: the mean and the largest error, against float64, in units of
2^-24 of the mean magnitude of the exact results. A layer's gradients are those of half
the squared distance of its outputs from normal targets. Functions: in units in the last
place of each exact result, at n normal inputs. A table in Markdown.
"""

import argparse
import copy
import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from samestep.kernels.execution import Execution
from samestep.kernels.interface import Call, Op, OpKind
from samestep.kernels.library import load_kernels
from samestep.kernels.lower import lower
from samestep.kernels.values import LossOp
from samestep.portable.passes import places_of
from samestep.state.flat import Flat


PANEL = 32
FUNCTIONS = ("exp", "log", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt")


class Row(NamedTuple):
    """One line of the table: (mean, largest) of both."""

    name: str
    own: tuple[float, float]
    torch: tuple[float, float]


def panels(x: Tensor) -> Tensor:
    """Return a matrix [rows, columns] as panels of 32 columns, padded with zeros."""
    rows, columns = x.shape
    padded = functional.pad(x, (0, -columns % PANEL))
    return padded.view(rows, -1, PANEL).transpose(0, 1).contiguous()


def matrix(x: Tensor, columns: int) -> Tensor:
    """Return panels as a matrix [rows, columns]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)[:, :columns]


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Return pointers to tensors."""
    return (ctypes.c_void_p * len(tensors))(*[x.data_ptr() for x in tensors])


def run(
    op: Op, buffers: list[Tensor], weights: Tensor, slot: Tensor, samples: int
) -> None:
    """Run one operation on one micro-batch."""
    starts, merges = torch.tensor([0, samples]), torch.zeros(1, dtype=torch.int64)
    places, slots = addresses(buffers), addresses([slot])
    call = Call(capacity=-(-samples // PANEL) * PANEL, micro_batches=1, slots_size=1)
    call.buffers, call.slots = ctypes.addressof(places), ctypes.addressof(slots)
    call.parameters = weights.data_ptr()
    call.starts, call.merges = starts.data_ptr(), merges.data_ptr()
    assert load_kernels().run(ctypes.addressof(op), 1, ctypes.addressof(call)) == 0


def operation(kind: OpKind, *numbers: int) -> Op:
    """Return an operation without factors and flags."""
    op = Op(kind=kind)
    op.i[: len(numbers)] = list(numbers)
    return op


def alone(*rows: int) -> list[int]:
    """Return the numbers of one position in buffers of so many rows."""
    return [1, *(number for count in rows for number in (count, 0, 0))]


def relative(y: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the mean and the largest error by the mean magnitude, in 2^-24."""
    error = (y.double() - exact).abs() / exact.abs().mean() * 2**24
    return error.mean().item(), error.max().item()


def in_ulps(y: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the mean and the largest error in units in the last place."""
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    error = (y.double() - exact).abs() * torch.exp2(24.0 - exponent.double())
    return error.mean().item(), error.max().item()


def layer_rows(samples: int, inputs: int, outputs: int) -> list[Row]:
    """Return the errors of a linear layer's products and of its bias's gradient."""
    x, dy = torch.randn(samples, inputs), torch.randn(samples, outputs)
    w = torch.randn(outputs, inputs)
    slot = torch.zeros(outputs * inputs + outputs)
    y, dx = torch.zeros(outputs, samples), torch.zeros(inputs, samples)
    buffers = [panels(x.T), panels(y), panels(dy.T), panels(dx), panels(by_sample(x))]
    for op in (
        operation(
            *(OpKind.LINEAR, 0, 1, inputs, outputs, 0, -1, 0), *alone(inputs, outputs)
        ),
        operation(
            *(OpKind.LINEAR_GRAD_INPUT, 2, 3, inputs, outputs, 0, -1),
            *alone(outputs, inputs),
        ),
        operation(
            *(OpKind.LINEAR_GRAD_WEIGHT, 2, 4, inputs, outputs, 0), *alone(outputs, 1)
        ),
        operation(OpKind.GRAD_BIAS, 2, outputs, outputs * inputs, outputs, 0),
    ):
        run(op, buffers, w, slot, samples)
    found = {
        "forward": (matrix(buffers[1], samples).T, lambda x, w, dy: x @ w.T),
        "gradient of the inputs": (
            matrix(buffers[3], samples).T,
            lambda x, w, dy: dy @ w,
        ),
        "gradient of the weight": (
            slot[: outputs * inputs].view(outputs, inputs),
            lambda x, w, dy: dy.T @ x,
        ),
        "gradient of the bias": (slot[outputs * inputs :], lambda x, w, dy: dy.sum(0)),
    }
    shape = f"{samples} x {inputs} x {outputs}"
    return [
        product_row(f"{name}, {shape}", own, formula, (x, w, dy))
        for name, (own, formula) in found.items()
    ]


def by_sample(x: Tensor) -> Tensor:
    """Return x [samples, features] with room for whole panels of samples."""
    return functional.pad(x, (0, 0, 0, -len(x) % PANEL))


def product_row(
    name: str, own: Tensor, formula: Callable[..., Tensor], of: tuple[Tensor, ...]
) -> Row:
    """Compare a result, and torch's, with the formula in double."""
    exact = formula(*(x.double() for x in of))
    return Row(name, relative(own, exact), relative(formula(*of), exact))


def function_row(number: int, inputs: int) -> Row:
    """Return the errors of one function."""
    function = getattr(torch, FUNCTIONS[number])
    x = torch.randn(inputs)
    x = x.abs() if FUNCTIONS[number] in ("log", "rsqrt") else x
    y = torch.empty_like(x)
    load_kernels().function(number, x.data_ptr(), y.data_ptr(), x.numel())
    exact = function(x.double())
    return Row(f"`{FUNCTIONS[number]}`", in_ulps(y, exact), in_ulps(function(x), exact))


class Shifted(nn.Module):
    """A layer after a sum, whose gradient is then that of the layer's inputs."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.randn(shape)), layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Compute the layer's outputs of `inputs` [b, ...] plus the shift, flat."""
        outputs = self.layer(inputs + self.shift)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return torch.as_tensor(outputs.flatten(1))


class Attention(nn.Module):
    """Causal attention of 4 heads over [t, 3 * width] queries, keys and values."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map [b, t, 3 * width] to [b, t, width]."""
        samples, positions, width = inputs.shape
        heads = inputs.view(samples, positions, 3, 4, width // 12)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "convolution, 24 channels, 14 x 14": (nn.Conv2d(24, 24, 3), (24, 14, 14)),
    "BatchNorm, 16 channels, 16 x 16": (nn.BatchNorm2d(16), (16, 16, 16)),
    "LayerNorm, 64 x 128": (nn.LayerNorm(128), (64, 128)),
    "softmax, 64 x 128": (nn.Softmax(-1), (64, 128)),
    "causal attention, 64 x 128": (Attention(), (64, 384)),
    "LSTM, 28 steps, 28 to 64": (nn.LSTM(28, 64, batch_first=True), (28, 28)),
    "GRU, 28 steps, 28 to 64": (nn.GRU(28, 64, batch_first=True), (28, 28)),
    "GELU": (nn.GELU(), (10_000,)),
    "GELU with tanh": (nn.GELU(approximate="tanh"), (10_000,)),
    "SiLU": (nn.SiLU(), (10_000,)),
}


def module_rows(name: str, layer: nn.Module, shape: tuple[int, ...]) -> list[Row]:
    """Return the errors of a layer's outputs and gradients, of one sample."""
    model = Shifted(layer, shape)
    inputs = torch.randn(1, *shape)
    targets = torch.randn_like(model(inputs))
    own = program_results(model, inputs, targets)
    theirs = eager_results(model, inputs, targets)
    exact = eager_results(copy.deepcopy(model).double(), inputs, targets)
    found = {
        "": [results[0] for results in (own, theirs, exact)],
        ", gradient of the inputs": [results[1] for results in (own, theirs, exact)],
    }
    if len(exact) > 2:
        weights = [torch.cat(results[2:]) for results in (own, theirs, exact)]
        found[", gradients of the parameters"] = weights
    return [
        Row(name + what, relative(ours, true), relative(torchs, true))
        for what, (ours, torchs, true) in found.items()
    ]


def program_results(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the outputs and the gradients of all parameters, flat, by a program."""
    flat, kernels = Flat(model), load_kernels()
    parameters, slot = torch.zeros(flat.size), torch.zeros(flat.size + flat.tail)
    flat.bind(parameters, write=True)
    outputs = torch.zeros_like(targets)
    for kind in (OpKind.STORE, OpKind.SQUARED_ERROR):
        is_loss, shape = kind == OpKind.SQUARED_ERROR, tuple(inputs.shape[1:])
        program = lower(model, shape, places_of(flat), LossOp(kind), backward=is_loss)
        execution = Execution(program, kernels, 1, 1)
        execution.bind(parameters=parameters, running=flat.saved_buffers())
        execution.bind_micro_batches(torch.tensor([0, 1]), torch.tensor([0]))
        execution.bind_slots([slot], flat.size)
        execution.bind(inputs=inputs.flatten(1), targets=targets, outputs=outputs)
        execution.call.weight = 1.0
        execution.run()
    return [outputs.flatten(), *(view.flatten() for view in flat.views(slot))]


def eager_results(model: nn.Module, inputs: Tensor, targets: Tensor) -> list[Tensor]:
    """Return the same by torch, in the type of the model's parameters."""
    parameters = list(model.parameters())
    outputs = model(inputs.to(parameters[0].dtype))
    loss = (outputs - targets.to(outputs.dtype)).square().sum() / 2
    gradients = torch.autograd.grad(loss, parameters)
    return [outputs.detach().flatten(), *(g.flatten() for g in gradients)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=2**20, help="of each function")
    inputs = parser.parse_args().inputs
    torch.manual_seed(0)
    rows = [
        *layer_rows(32, 784, 512),
        *layer_rows(256, 512, 256),
        *layer_rows(1024, 1024, 1024),
        *(row for name, of in LAYERS.items() for row in module_rows(name, *of)),
        *(function_row(number, inputs) for number in range(len(FUNCTIONS))),
    ]
    print(f"Functions: n={inputs:,}.\n")
    print("| | mean | largest | torch: mean | largest |")
    print("|---|---|---|---|---|")
    for name, own, theirs in rows:
        numbers = " | ".join(f"{x:.3g}" for x in (*own, *theirs))
        print(f"| {name} | {numbers} |")


if __name__ == "__main__":
    main()
