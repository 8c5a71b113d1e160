"""Functions of the kernels: their bits and their errors, on all floats."""

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import pytest
import torch
from pointwise_calls import bits, compile_reference, misaligned
from torch import Tensor

from samestep.kernels.library import load_kernels, supported_isas


NAMES = ("exp", "log", "tanh", "sigmoid", "erf", "sin", "cos", "rsqrt")
"""In the order of their numbers; each has the name of torch's function."""
BOUNDS = dict.fromkeys(NAMES, 0.504) | {"rsqrt": 1.5}
"""The largest error of docs/arithmetic.md, in units in the last place."""
BLOCK = 2**20


def every(step: int) -> Iterator[Tensor]:
    """Yield all floats in blocks, or every `step`-th of all bit patterns."""
    offsets = torch.arange(BLOCK, dtype=torch.int32) * step
    for first in range(-(2**31), 2**31, BLOCK * step):
        yield (offsets + first).view(torch.float32)


def computed(isa: str, number: int, x: Tensor) -> Tensor:
    """Return a function of x by an instruction set's kernels."""
    y = torch.empty_like(x)
    known = load_kernels(isa).function(number, x.data_ptr(), y.data_ptr(), x.numel())
    assert known == 0
    return y


def errors(y: Tensor, exact: Tensor) -> Tensor:
    """Return the errors of floats in units in the last place of the exact doubles.

    What should be a NaN, an infinity (beyond the largest float) or a zero, and is not,
    has an infinite error, and so has one of these where it should not be.
    """
    exponent = torch.frexp(exact).exponent.clamp(min=-125)
    ulps = (y.double() - exact).abs() * torch.exp2(24.0 - exponent.double())
    rounded = exact.float()
    is_same = (y == rounded) | (y.isnan() & rounded.isnan())
    is_finite = y.isfinite() & rounded.isfinite()
    return torch.where(is_finite, ulps, torch.where(is_same, 0.0, torch.inf))


class Largest(NamedTuple):
    """The largest errors found: ours and torch's; whether all bits were equal."""

    own: float
    torch: float
    is_equal: bool


def largest(name: str, isas: list[str], x: Tensor) -> Largest:
    """Return the errors at x, and whether the instruction sets give equal bits."""
    number, function = NAMES.index(name), getattr(torch, name)
    exact = function(x.double())
    found = [computed(isa, number, x) for isa in isas]
    is_equal = all(torch.equal(bits(found[0]), bits(y)) for y in found[1:])
    own, theirs = errors(found[0], exact), errors(function(x), exact)
    return Largest(own.max().item(), theirs.max().item(), is_equal)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    return compile_reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_stated_error_and_equal_bits_everywhere(name: str) -> None:
    """On every 4,093rd float with every instruction set."""
    for x in every(4093):
        found = largest(name, supported_isas(), x)
        assert found.own <= BOUNDS[name]
        assert found.is_equal


@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_bits_of_the_reference(
    reference: ctypes.CDLL, name: str
) -> None:
    """A plain C program of the formulas; any size, any alignment."""
    number = NAMES.index(name)
    whole = torch.cat([x[::61] for x in every(4093)])
    for size, by in ((whole.numel(), 0), (0, 0), (1, 1), (17, 3), (100, 15)):
        x, y = misaligned(whole[:size], by), misaligned(torch.zeros(size), by)
        expected = torch.zeros(size)
        pointers = [ctypes.c_void_p(a.data_ptr()) for a in (x, expected)]
        reference.reference_function(number, *pointers, ctypes.c_int64(size))
        for isa in supported_isas():
            load_kernels(isa).function(number, x.data_ptr(), y.data_ptr(), size)
            assert torch.equal(bits(y), bits(expected)), isa


@pytest.mark.parametrize("name", NAMES)
def test_special_numbers_go_as_in_torch(name: str) -> None:
    """Zeros keep their sign; infinities, NaNs, subnormals, huge numbers."""
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3e38])
    expected = getattr(torch, name)(x.double()).float()
    for isa in supported_isas():
        y = computed(isa, NAMES.index(name), x)
        if name == "rsqrt":
            assert torch.allclose(y, expected, equal_nan=True)
        else:
            assert torch.equal(bits(y), bits(expected))


def test_an_unknown_function_is_refused() -> None:
    """By its number."""
    assert load_kernels().function(len(NAMES), 0, 0, 0) == -1


def test_flushing_of_subnormals_by_the_caller_changes_nothing() -> None:
    """The kernels set the mode of floating point, and restore it."""
    x = torch.tensor([-100.0, 1e-42])
    expected = computed(supported_isas()[0], 0, x)
    assert torch.set_flush_denormal(True)
    try:
        for isa in supported_isas():
            assert torch.equal(computed(isa, 0, x), expected)
        flushed = torch.tensor([1e-30]) * 1e-10
    finally:
        torch.set_flush_denormal(False)
    assert flushed.item() == 0.0


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_a_function_has_the_stated_error_on_all_floats(
    reference: ctypes.CDLL, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 2^32, and equal bits of all instruction sets but the slow v2.

    Prints a row of the table of docs/arithmetic.md; torch's error is on every 61st.
    """
    number, isas = NAMES.index(name), [isa for isa in supported_isas() if isa != "v2"]
    reference.reference_error.restype = ctypes.c_double

    def error(x: Tensor, y: Tensor) -> float:
        pointers = [ctypes.c_void_p(a.data_ptr()) for a in (x, y)]
        size = ctypes.c_int64(x.numel())
        return float(reference.reference_error(number, *pointers, size))

    def own_error(x: Tensor) -> float:
        y, *others = [computed(isa, number, x) for isa in isas]
        assert all(have_same_bits(y, other) for other in others)
        return error(x, y)

    own, blocks = 0.0, every(1)
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        while batch := list(islice(blocks, threads)):
            own = max(own, *pool.map(own_error, batch))
    theirs = max(error(x, getattr(torch, name)(x)) for x in every(61))
    with capsys.disabled():
        print(f"\n| `{name}` | {own:.4f} | {theirs:.4g} |")
    assert own <= BOUNDS[name]


def have_same_bits(x: Tensor, y: Tensor) -> bool:
    """Compare bits; of NaNs, which is slower, only their places."""
    is_same = torch.equal(x.view(torch.int32), y.view(torch.int32))
    return is_same or torch.equal(bits(x), bits(y))
