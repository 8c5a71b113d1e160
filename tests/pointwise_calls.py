"""Calls of single operations on random data, and the plain C reference beside them."""

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from samestep.core.tree import num_merges, subtrees
from samestep.kernels.compiling import machine_compiler
from samestep.kernels.interface import Call, Kernels, Op, OpFlag, OpKind
from samestep.kernels.library import load_kernels, supported_isas


PANEL = 32
TAIL = 256
"""Where the tails of the slots of these calls begin."""
SPECIAL = (0.0, -0.0, 1e-40, -1e-44, 1e38, float("inf"), float("-inf"), float("nan"))
SOURCES = Path(__file__).with_name("kernels")


def compile_reference(
    directory: Path, name: str = "reference_pointwise.c"
) -> ctypes.CDLL:
    """Compile a file of tests/kernels; without a C compiler, skip the test."""
    command = machine_compiler()
    if command is None:
        pytest.skip("there is no C compiler here")
    made = directory / "reference.so"
    headers = Path(__file__).parents[1] / "src/samestep/kernels/csrc"
    flags = ["-std=gnu11", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    source = str(SOURCES / name)
    subprocess.run(
        [*command, *flags, f"-I{headers}", source, "-o", str(made), "-lm"], check=True
    )
    return ctypes.CDLL(str(made))


def misaligned(values: Tensor, by: int) -> Tensor:
    """Return a copy that begins `by` elements after an address of 64 bytes."""
    room = torch.zeros(values.numel() + 32, dtype=values.dtype)
    first = -room.data_ptr() % 64 // room.element_size() + by
    copy = room[first : first + values.numel()].view(values.shape)
    return copy.copy_(values)


def with_specials(values: Tensor, draw: torch.Generator, share: float) -> Tensor:
    """Put zeros, subnormals, infinities and NaNs in the place of a share of values."""
    special = torch.tensor(SPECIAL)
    chosen = special[torch.randint(len(SPECIAL), values.shape, generator=draw)]
    return torch.where(torch.rand(values.shape, generator=draw) < share, chosen, values)


def bits(x: Tensor) -> Tensor:
    """Return the bits of floats, all NaNs with the same."""
    same = torch.where(x.isnan(), torch.tensor(float("nan"), dtype=x.dtype), x)
    return same.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


@dataclass
class Sample:
    """One call: random buffers, micro-batches of given sizes, room for results.

    The micro-batches are leaves `first..` of a tree of `leaves`. `misalignment` is in
    elements; `specials` is the share of numbers that are zeros, NaNs and so on.
    """

    sizes: Sequence[int]
    first: int = 0
    leaves: int = 0
    seed: int = 0
    misalignment: int = 0
    specials: float = 0.0
    memory: dict[str, Tensor] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)
    workspaces: set[int] = field(default_factory=set)
    draw: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        """Draw what every call has."""
        self.draw.manual_seed(self.seed)
        owned = (self.first, self.first + len(self.sizes))
        num_leaves = max(self.leaves, owned[1])
        merges = [num_merges(m, owned, num_leaves) for m in range(*owned)]
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        self.samples = int(ends[-1])
        self.capacity = self.samples // PANEL * PANEL + PANEL
        self.num_slots = len(subtrees(owned, num_leaves))
        self.integers("starts", ends)
        self.integers("merges", torch.tensor(merges))
        self.integers(
            "keys", torch.randint(2**63 - 1, (len(merges),), generator=self.draw)
        )
        self.floats("parameters", 256)
        self.floats("running", 256)
        self.memory["running"].abs_()
        for s in range(self.num_slots):
            self.floats(f"slot{s}", 2 * TAIL)
        for name in ("losses", "metrics"):
            self.floats(name, self.samples)
        for name in ("loss_sums", "metric_sums"):
            self.memory[name] = torch.zeros(len(merges), dtype=torch.float64)
        self.integers("answers", torch.zeros(self.samples, dtype=torch.int64))

    def integers(self, name: str, values: Tensor) -> None:
        """Give the call an array of integers."""
        self.memory[name] = values.clone()

    def floats(self, name: str, *shape: int) -> Tensor:
        """Give the call an array of random floats."""
        values = torch.randn(shape, generator=self.draw)
        values = with_specials(values, self.draw, self.specials)
        self.memory[name] = misaligned(values, self.misalignment)
        return self.memory[name]

    def by_feature(self, features: int, scale: float = 1.0) -> int:
        """Add a buffer by feature, with zeros as padding; return its number."""
        panels = self.capacity // PANEL
        x = torch.randn(panels, features, PANEL, generator=self.draw) * scale
        x = with_specials(x, self.draw, self.specials)
        columns = torch.arange(panels * PANEL).view(panels, 1, PANEL)
        x = torch.where(columns < self.samples, x, 0.0)
        return self.buffer(x)

    def buffer(self, values: Tensor) -> int:
        """Add a buffer; return its number."""
        self.buffers.append(misaligned(values, self.misalignment))
        return len(self.buffers) - 1

    def workspace(self, size: int) -> int:
        """Add a buffer in which any bits may be left; return its number."""
        number = self.buffer(torch.zeros(size))
        self.workspaces.add(number)
        return number

    def call(self) -> Call:
        """Return the structure; this object keeps the memory alive."""
        call = Call(capacity=self.capacity, micro_batches=len(self.sizes), tail=TAIL)
        call.weight, call.slots_size = 1 / 64, self.num_slots
        slots = [self.memory[f"slot{s}"] for s in range(self.num_slots)]
        self.pointers = {
            "buffers": _addresses(self.buffers),
            "slots": _addresses(slots),
        }
        for name, pointers in self.pointers.items():
            setattr(call, name, ctypes.addressof(pointers))
        for name, values in self.memory.items():
            if not name.startswith("slot"):
                setattr(call, name, values.data_ptr())
        return call

    def results(self, features: dict[int, int]) -> list[Tensor]:
        """Return the bits of all memory; without padding in buffers by feature.

        `features` gives the number of features of those buffers. Workspaces are left
        out.
        """
        found = list(self.memory.values())
        for number, x in enumerate(self.buffers):
            if number in self.workspaces:
                continue
            if number in features:
                rows = x.view(-1, features[number], PANEL).permute(0, 2, 1)
                x = rows.reshape(-1, features[number])[: self.samples]
            found.append(x)
        return [bits(x) if x.is_floating_point() else x for x in found]


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * max(len(tensors), 1))(*[x.data_ptr() for x in tensors])


def operation(
    kind: OpKind, i: Sequence[int], f: Sequence[float] = (), flags: int = 0
) -> Op:
    """Return one operation."""
    op = Op(kind=kind, flags=int(OpFlag(flags)))
    op.i[: len(i)], op.f[: len(f)] = list(i), list(f)
    return op


Made = tuple[Sample, Op, dict[int, int]]
"""A call, its operation, and the features of its buffers by feature."""


def outcome(made: Made, run: Callable[[Op, Call], object]) -> list[Tensor]:
    """Run an operation and return all memory."""
    sample, op, features = made
    run(op, sample.call())
    return sample.results(features)


def run_with(kernels: Kernels) -> Callable[[Op, Call], object]:
    """Return what runs one operation with an instruction set's kernels."""

    def run(op: Op, call: Call) -> None:
        assert kernels.run(ctypes.addressof(op), 1, ctypes.addressof(call)) == 0

    return run


def check_bits(reference: Callable[..., object], made: Callable[[], Made]) -> None:
    """Compare an operation of every instruction set with the reference."""

    def plain(op: Op, call: Call) -> None:
        reference(ctypes.byref(op), ctypes.byref(call))

    expected = outcome(made(), plain)
    for isa in supported_isas():
        found = outcome(made(), run_with(load_kernels(isa)))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y), isa
