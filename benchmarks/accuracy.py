"""How far are the kernels of portable arithmetic, and torch's, from exact results?

    python benchmarks/accuracy.py

Products and sums: the mean and the largest error, against float64, in units of 2^-24 of
the mean magnitude of the exact results. Functions: in units in the last place of each
exact result, at n normal inputs. A table in Markdown.
"""

import argparse
import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from samestep.kernels.interface import Call, Op, OpKind
from samestep.kernels.library import load_kernels


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
