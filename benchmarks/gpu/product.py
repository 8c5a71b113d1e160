"""A product in the order of docs/arithmetic.md, compared bit by bit with the CPU's.

`product.cu` is compiled for the GPU by NVRTC, through PyTorch; without a GPU, as C for
the CPU, where coroutines take the places of a block's threads.
"""

import ctypes
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpu.report import Report, Skipped
from gpu.sizes import Sizes
from samestep.kernels.compiling import FLAGS, machine_compiler
from samestep.kernels.interface import Call, Op, OpKind
from samestep.kernels.library import load_kernels


Floats = NDArray[np.float32]
Product = Callable[[Floats, Floats], Floats]
"""[rows, terms] and [terms, columns] -> [rows, columns]; any of both may be a view."""

HERE = Path(__file__).parent
PANEL, SIDE, THREADS = 32, 128, 256
SHAPES = ((1, 1, 1), (2, 7, 255), (33, 7, 256), (9, 200, 257), (130, 129, 520))
"""Rows, columns, terms."""
LARGE = ((512, 512, 784), (1000, 700, 1300))
SQUARES = "square matrices"


def on_host(sizes: Sizes, report: Report) -> None:
    """Compile the GPU's kernel for the CPU, and compare its bits."""
    compiler = machine_compiler()
    if compiler is None:
        raise Skipped("needs a C compiler")
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "product.so"
        flags = [*FLAGS, "-fvisibility=default", "-fno-strict-aliasing", "-fPIC"]
        flags += ["-Wno-unknown-pragmas", "-Werror", "-shared"]
        source = str(HERE / "on_host.c")
        subprocess.run([*compiler, *flags, source, "-o", str(out), "-lm"], check=True)
        library = ctypes.CDLL(str(out))

        def product(a: Floats, b: Floats) -> Floats:
            c = np.full((len(a), b.shape[1]), np.nan, np.float32)
            numbers = (ctypes.c_int * 7)(*numbers_of(a, b))
            pointers = (ctypes.c_void_p(x.ctypes.data) for x in (a, b, c))
            if library.product_on_host(*pointers, numbers):
                raise MemoryError
            return c

        compare(product, SHAPES, report)


def on_gpu(sizes: Sizes, report: Report) -> None:
    """Compare the kernel's bits on the GPU, and its speed with cuBLAS."""
    kernel = compile_kernel()

    def product(a: Floats, b: Floats) -> Floats:
        # The same memory, so that the strides are those of the views.
        left, right = (on_device(x) for x in (a, b))
        return multiply(kernel, left, right).cpu().numpy()

    compare(product, (*SHAPES, *LARGE), report)
    torch.backends.cuda.matmul.allow_tf32 = False
    n = sizes.side
    a, b = (torch.randn(n, n, device="cuda") for _ in range(2))
    for name, run in {
        "in portable order": lambda: multiply(kernel, a, b),
        "cuBLAS": lambda: torch.mm(a, b),
    }.items():
        seconds = timed(run)
        rate = 2 * n**3 / statistics.median(seconds) / 1e9
        figures = {"side": n, "gflops": round(rate), "n": len(seconds)}
        report.figures[f"{SQUARES}, {name}"] = figures
        print(f"{SQUARES}, {name}: {rate:.0f} GFLOP/s (n={len(seconds)})", flush=True)


def compile_kernel() -> Any:
    """Return the kernel, compiled for this GPU."""
    # PyTorch asks for the headers of a CUDA installation, and this kernel has none.
    os.environ.setdefault("CUDA_HOME", str(HERE))
    preload_nvrtc()
    source = (
        '#define KERNEL extern "C" __global__\n' + (HERE / "product.cu").read_text()
    )
    return torch.cuda._compile_kernel(source, "product")


def preload_nvrtc() -> None:
    """Load the NVRTC that came with PyTorch, where the system's loader finds none."""
    for package in (Path(torch.__file__).parents[1] / "nvidia").glob("*/lib"):
        for name in ("libnvrtc-builtins.so.*", "libnvrtc.so.*"):  # which needs them
            for library in package.glob(name):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def multiply(kernel: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return the product of matrices on the GPU, in portable order."""
    (rows, terms), columns = a.shape, b.shape[1]
    c = a.new_full((rows, columns), float("nan"))
    steps = [*a.stride(), b.stride(1), b.stride(0)]
    grid = (-(-columns // SIDE), -(-rows // SIDE), 1)
    arguments = [a, b, c, rows, columns, terms, *steps]
    kernel(grid, (THREADS, 1, 1), arguments)
    return c


def on_device(x: Floats) -> Tensor:
    """Copy a matrix, or the view that is its transpose, with its strides."""
    if x.flags.c_contiguous:
        return torch.from_numpy(x).cuda()
    return torch.from_numpy(x.T).cuda().T


def timed(run: Callable[[], object], repeats: int = 20) -> list[float]:
    """Return the seconds of each run on the GPU, after two that warm it."""
    run(), run()
    event: Callable[..., Any] = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def compare(product: Product, shapes: Any, report: Report) -> None:
    """Compare the bits of a product with those of samestep's kernels."""
    report.figures["n"] = 0
    for seed, (rows, columns, terms) in enumerate(shapes):
        draws = np.random.default_rng(seed)
        for form, a, b in forms(draws, rows, columns, terms):
            what = f"{rows} x {terms} x {columns}, {form}"
            report.check(what, partial(same, product, a, b))
            report.figures["n"] += 1


def forms(
    draws: np.random.Generator, rows: int, columns: int, terms: int
) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield factors that lie in memory as those of a linear layer's three products."""
    yield "forward", draw(draws, rows, terms), draw(draws, columns, terms).T
    yield "gradient of inputs", draw(draws, rows, terms), draw(draws, terms, columns)
    yield "gradient of weight", draw(draws, terms, rows).T, draw(draws, terms, columns)


def draw(draws: np.random.Generator, *shape: int) -> Floats:
    """Return numbers of very different sizes, among them zeros and subnormals."""
    values = draws.standard_normal(shape) * 2.0 ** draws.integers(-12, 12, shape)
    kind = draws.random(shape)
    values = np.where(kind < 0.02, values * 2.0**-140, values)
    return np.where(kind > 0.98, 0, values).astype(np.float32)


def same(product: Product, a: Floats, b: Floats) -> str:
    """Compare a product with that of the kernels; return `identical`, or raise."""
    found, expected = product(a, b), by_kernels(a, b)
    differ = np.count_nonzero(found.view(np.int32) != expected.view(np.int32))
    if differ:
        raise RuntimeError(f"{differ} of {found.size} elements differ")
    return "identical"


def by_kernels(a: Floats, b: Floats) -> Floats:
    """Return a product as samestep's kernels compute it: a layer without a bias."""
    (samples, inputs), outputs = a.shape, b.shape[1]
    panels = -(-samples // PANEL)
    x = np.zeros((inputs, panels * PANEL), np.float32)
    x[:, :samples] = a.T
    x = x.reshape(inputs, panels, PANEL).swapaxes(0, 1).copy()
    y, weight = np.zeros((panels, outputs, PANEL), np.float32), b.T.copy()
    buffers = np.array([x.ctypes.data, y.ctypes.data], np.int64)
    starts = np.array([0, samples], np.int64)
    op, numbers = Op(kind=OpKind.LINEAR), (0, 1, inputs, outputs, 0, -1, 0)
    alone = (1, inputs, 0, 0, outputs, 0, 0)
    op.i[: len(numbers) + len(alone)] = [*numbers, *alone]
    call = Call(
        buffers=buffers.ctypes.data,
        parameters=weight.ctypes.data,
        capacity=panels * PANEL,
        micro_batches=1,
        starts=starts.ctypes.data,
    )
    if load_kernels().run(ctypes.addressof(op), 1, ctypes.addressof(call)):
        raise RuntimeError("the kernels refused the product")
    return y.swapaxes(0, 1).reshape(outputs, -1)[:, :samples].T.copy()


def numbers_of(a: Floats, b: Floats) -> list[int]:
    """Return rows, columns, terms and steps, as `product` takes them."""
    steps = [*a.strides, b.strides[1], b.strides[0]]
    return [len(a), b.shape[1], len(b), *(step // 4 for step in steps)]
