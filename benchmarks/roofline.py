"""Each kernel of portable arithmetic beside what one core can do at most.

    taskset -c 1 python benchmarks/roofline.py [--isa v3] > roofline.md

Products are compared with a loop of fused multiply-adds in registers and with
torch's on one thread, kernels that are bound by memory with a copy of arrays of the
same size (bytes read and written once each). Every burst is of about a millisecond and
is repeated in turn with all others; the shortest counts, as the others are disturbed.
Needs a C compiler.
"""

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from layer_passes import layer_passes
from numpy.typing import NDArray

from samestep.kernels.compiling import FLAGS, machine_compiler
from samestep.kernels.interface import (
    Call,
    Kernels,
    Op,
    OpKind,
    Optimizer,
    OptimizerKind,
)
from samestep.kernels.library import load_kernels
from samestep.kernels.targets import ISAS, SOURCES, architecture


SHAPES = ((784, 512), (512, 256), (256, 128), (1024, 1024))
SAMPLES = (32, 512)
CONVOLUTIONS = ((1, 24, 28, 5, 0), (24, 32, 12, 3, 0), (64, 64, 16, 3, 1))
"""Channels of both sides, height and width, kernel, padding."""
PARAMETERS = 567_434
"""The layers of the perceptron 784-512-256-128-10."""
BURST = 1e-3
PANEL = 32


@dataclass
class Case:
    """One line of a table: what runs, what it does, and the shortest time so far."""

    names: tuple[str, ...]
    work: float
    """Floating-point operations, or bytes."""
    start: Callable[[], object]
    repeats: int = 0
    best: float = float("inf")

    def burst(self) -> None:
        """Run for about a millisecond; the first time, find out how often that is."""
        if self.repeats == 0:
            self.repeats = max(1, int(BURST / max(seconds(self.start, 1), 1e-7)))
        self.best = min(self.best, seconds(self.start, self.repeats))

    @property
    def rate(self) -> float:
        """Return billions of operations or bytes per second."""
        return self.work / self.best / 1e9


def seconds(start: Callable[[], object], repeats: int) -> float:
    """Return the processor's time for one run, after one that warms the caches."""
    start()
    began = time.thread_time()
    for _ in range(repeats):
        start()
    return (time.thread_time() - began) / repeats


@dataclass
class Layer:
    """A linear layer with arrays of its own, by panels."""

    kernels: Kernels
    inputs: int
    outputs: int
    samples: int
    pieces: int
    weights: int = 0
    """Those of a convolution; 0: a linear layer."""
    kept: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Allocate everything and prepare the call."""
        columns = -(-self.samples // PANEL) * PANEL
        self.weights = self.weights or self.inputs * self.outputs
        room = max(self.inputs + PANEL, 512)
        sizes = [self.inputs + PANEL, self.outputs, self.inputs, room]
        buffers = self.pointers([self.draw(n * columns) for n in sizes])
        slots = self.pointers([self.draw(self.weights)])
        parameters = self.draw(self.weights)
        starts = np.linspace(0, self.samples, self.pieces + 1).astype(np.int64)
        merges = np.array([trailing(m + 1) for m in range(self.pieces)], np.int64)
        self.kept += [parameters, starts, merges]
        self.call = Call(
            buffers=buffers.ctypes.data,
            parameters=parameters.ctypes.data,
            capacity=columns,
            micro_batches=self.pieces,
            starts=starts.ctypes.data,
            merges=merges.ctypes.data,
            slots_size=1,
            slots=slots.ctypes.data,
        )

    def draw(self, size: int) -> NDArray[np.float32]:
        """Return random numbers that begin with a line of the cache."""
        room = np.random.default_rng(0).standard_normal(size + 16, np.float32)
        first = -room.ctypes.data // 4 % 16
        return room[first : first + size]

    def pointers(self, arrays: list[NDArray[np.float32]]) -> NDArray[np.int64]:
        """Return the addresses of arrays, and keep them alive."""
        addresses = np.array([array.ctypes.data for array in arrays], np.int64)
        self.kept += [arrays, addresses]
        return addresses

    def starter(self, kind: OpKind, *i: int) -> Callable[[], object]:
        """Return what runs an operation once."""
        op, call = Op(kind=kind), ctypes.addressof(self.call)
        op.i[: len(i)] = i
        self.kept.append(op)

        def start() -> None:
            self.kernels.run(ctypes.addressof(op), 1, call)

        return start


def trailing(number: int) -> int:
    """Return how many times 2 divides a number: the sums that a leaf completes."""
    return (number & -number).bit_length() - 1


def alone(*rows: int) -> list[int]:
    """Return the numbers of one position in buffers of so many rows."""
    return [1, *(number for count in rows for number in (count, 0, 0))]


def product_cases(kernels: Kernels) -> Iterator[Case]:
    """Yield the three forms of every layer, and what torch.mm needs for them."""
    for inputs, outputs in SHAPES:
        for samples in SAMPLES:
            names = (f"{inputs} -> {outputs}", str(samples))
            work = 2.0 * inputs * outputs * samples
            layer = Layer(kernels, inputs, outputs, samples, max(1, samples // 256))
            fine = Layer(kernels, inputs, outputs, samples, samples // 16)
            forms = {
                "forward": layer.starter(
                    *(OpKind.LINEAR, 0, 1, inputs, outputs, 0, -1, 0),
                    *alone(inputs, outputs),
                ),
                "gradient of inputs": layer.starter(
                    *(OpKind.LINEAR_GRAD_INPUT, 1, 2, inputs, outputs, 0, -1),
                    *alone(outputs, inputs),
                ),
                "gradient of weight": layer.starter(
                    *(OpKind.LINEAR_GRAD_WEIGHT, 1, 3, inputs, outputs, 0),
                    *alone(outputs, 1),
                ),
                "the same, in pieces of 16": fine.starter(
                    *(OpKind.LINEAR_GRAD_WEIGHT, 1, 3, inputs, outputs, 0),
                    *alone(outputs, 1),
                ),
            }
            for form, start in forms.items():
                yield Case((*names, form, "samestep"), work, start)
            for form, start in torch_forms(inputs, outputs, samples).items():
                yield Case((*names, form, "torch"), work, start)


def torch_forms(
    inputs: int, outputs: int, samples: int
) -> dict[str, Callable[[], object]]:
    """Return torch's products of a layer."""
    x, dy = torch.randn(samples, inputs), torch.randn(samples, outputs)
    w, y, dx = torch.randn(outputs, inputs), torch.empty_like(dy), torch.empty_like(x)
    dw = torch.empty_like(w)
    return {
        "forward": lambda: torch.mm(x, w.T, out=y),
        "gradient of inputs": lambda: torch.mm(dy, w, out=dx),
        "gradient of weight": lambda: torch.mm(dy.T, x, out=dw),
    }


def conv_cases(kernels: Kernels) -> Iterator[Case]:
    """Yield the three forms of convolutions of 64 images, samestep's and torch's."""
    for before, after, size, kernel, padding in CONVOLUTIONS:
        pixels = size + 2 * padding - kernel + 1
        names = (f"{before} -> {after}, {kernel} x {kernel}, {size} x {size}", "64")
        weights = before * after * kernel**2
        layer = Layer(kernels, before * size**2, after * pixels**2, 64, 2, weights)
        pairs = [n for n in (size, kernel, 1, padding, 1) for _ in range(2)]
        numbers = [before, after, 1, *pairs, 0]
        forms = {
            "forward": layer.starter(OpKind.CONV, 0, 1, *numbers, -1, 0),
            "gradient of inputs": layer.starter(
                OpKind.CONV_GRAD_INPUT, 1, 2, *numbers, -1, -1
            ),
            "gradient of weight": layer.starter(
                OpKind.CONV_GRAD_WEIGHT, 1, 0, *numbers, -1, 3, -1
            ),
        }
        others = torch_convolutions(before, after, size, kernel, padding)
        work = 2.0 * 64 * weights * pixels**2
        for form, start in forms.items():
            yield Case((*names, form, "samestep"), work, start)
            yield Case((*names, form, "torch"), work, others[form])


def torch_convolutions(
    before: int, after: int, size: int, kernel: int, padding: int
) -> dict[str, Callable[[], object]]:
    """Return torch's convolutions with the channels innermost, its fastest layout."""
    x, w = (
        torch.randn(64, before, size, size),
        torch.randn(after, before, kernel, kernel),
    )
    x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    settings = [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1
    dy = torch.randn_like(torch.convolution(x, w, None, *settings))

    def backward(*wanted: bool) -> object:
        mask = [*wanted, False]
        return torch.ops.aten.convolution_backward(dy, x, w, None, *settings, mask)

    return {
        "forward": lambda: torch.convolution(x, w, None, *settings),
        "gradient of inputs": partial(backward, True, False),
        "gradient of weight": partial(backward, False, True),
    }


def memory_cases(kernels: Kernels, peak: ctypes.CDLL) -> Iterator[Case]:
    """Yield kernels that are bound by memory, and copies of as many bytes."""
    vectors = [np.zeros(PARAMETERS, np.float32) for _ in range(5)]
    a, b, c, d, e = (c_void_p(v.ctypes.data) for v in vectors)
    leaves = np.array([v.ctypes.data for v in vectors[:2]], np.int64)
    order = np.array([0, 1, -1], np.int32)
    tree = (c_void_p(leaves.ctypes.data), c_void_p(order.ctypes.data), c_int64(3))
    size, kept = c_int64(PARAMETERS), (vectors, leaves, order)
    adam = Optimizer(kind=OptimizerKind.ADAM, lr=1e-3, root=1, eps=1e-8)
    how = ctypes.addressof(adam)
    floats = 4.0 * PARAMETERS

    def case(name: str, arrays: int, start: Callable[[], object]) -> Case:
        return Case((name,), arrays * floats, lambda: (start(), kept)[0])

    yield case("copy of the parameters", 2, lambda: peak.copy(a, b, size))
    yield case("sum of two partials", 3, lambda: kernels.tree_sum(c, *tree, size))
    yield case(
        "sum of two partials and Adam",
        8,
        lambda: kernels.update(how, *tree, c, d, e, c_int64(0), size, None) or adam,
    )
    yield case("average of weights", 3, lambda: kernels.average(a, b, 0.1, size))
    for samples in (64, 512):
        layer = Layer(kernels, 784, 512, samples, 2)
        inputs = 784.0 * samples * 4
        start = layer.starter(OpKind.TRANSPOSE, 0, 3, 784, *alone(784))
        yield Case((f"transpose of 784 x {samples}",), 2 * inputs, start)
        start = layer.starter(OpKind.GRAD_BIAS, 1, 512, 0, 512, 0)
        yield Case((f"gradient of 512 biases, {samples}",), 2048.0 * samples, start)
        count = c_int64(784 * samples)
        yield Case(
            (f"copy of 784 x {samples}",), 2 * inputs, partial(peak.copy, a, b, count)
        )


def compile_peak(isa: str, directory: Path) -> ctypes.CDLL:
    """Compile the loops that reach the peaks for an instruction set."""
    out, source = directory / "peak.so", Path(__file__).with_name("peak.c")
    flags = [*FLAGS, *ISAS[architecture()][isa], "-fvisibility=default", "-fPIC"]
    command = [*(machine_compiler() or ["cc"]), *flags, "-shared", f"-I{SOURCES}"]
    subprocess.run([*command, str(source), "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    library.fma_loop.restype = c_double
    return library


def print_products(cases: list[Case], peak: float) -> None:
    """Print the table of products."""
    rates = {case.names: case.rate for case in cases}
    print("| layer | samples | product | GFLOP/s | of the peak | torch |")
    print("|---|---|---|---|---|---|")
    for (*names, library), rate in rates.items():
        if library == "samestep":
            other = rates.get((*names, "torch"))
            of_torch = f"{other:.0f}" if other else ""
            cells = (*names, f"{rate:.0f}", f"{rate / peak:.0%}", of_torch)
            print("|", " | ".join(cells), "|")


def main() -> None:
    """Measure everything and print two tables in Markdown."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--isa", help="instruction set; default: the best there is")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels = load_kernels(options.isa)
    with tempfile.TemporaryDirectory() as directory:
        peak = compile_peak(kernels.isa.decode(), Path(directory))
        steps = c_int64(20_000)
        loop = Case(("fma",), peak.fma_loop(steps), lambda: peak.fma_loop(steps))
        products = [
            *product_cases(kernels),
            *conv_cases(kernels),
            *(Case(*parts) for parts in layer_passes(kernels)),
        ]
        memory = [*memory_cases(kernels, peak)]
        for _ in range(options.rounds):
            for case in (*products, *memory):
                loop.burst()
                case.burst()
    isa = kernels.isa.decode()
    print(f"One core, {isa}: a loop of fma reaches {loop.rate:.0f} GFLOP/s.")
    print(f"The shortest of n={options.rounds} bursts each.\n")
    print_products(products, loop.rate)
    print("\n| kernel | GB/s |\n|---|---|")
    for case in memory:
        print(f"| {case.names[0]} | {case.rate:.1f} |")


if __name__ == "__main__":
    main()
