"""Sums up the tree, updates, averages and norms beside a plain C reference."""

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_calls import bits, compile_reference, misaligned, with_specials
from torch import Tensor

from samestep.core.tree import Range, split
from samestep.kernels.interface import Optimizer, OptimizerKind
from samestep.kernels.library import load_kernels, supported_isas


NUMBERS = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "one_minus_beta1": 0.1,
    "one_minus_beta2": 0.001,
    "root": 1.5,
    "eps": 1e-8,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compile the reference."""
    library = compile_reference(tmp_path_factory.mktemp("reference"))
    library.reference_average.argtypes = (*(ctypes.c_void_p,) * 2, ctypes.c_float)
    return library


def postfix(node: Range) -> list[int]:
    """Return the canonical tree below a node as a postfix program."""
    if node[1] - node[0] == 1:
        return [node[0]]
    middle = split(node)
    return [*postfix((node[0], middle)), *postfix((middle, node[1])), -1]


class Arrays:
    """Leaves of the tree and the three vectors of an update, at any alignment."""

    def __init__(
        self, leaves: int, size: int, seed: int, by: int, specials: float
    ) -> None:
        """Draw them."""
        draw = torch.Generator().manual_seed(seed)

        def vector(scale: float) -> Tensor:
            x = torch.randn(size, generator=draw) * scale
            return misaligned(with_specials(x, draw, specials), by)

        scale = (1.0, 1e-20)[seed % 2]
        self.leaves = [vector(scale) for _ in range(leaves)]
        self.parameters, self.first, self.second = vector(1), vector(scale), vector(1)
        self.second.abs_()
        addresses = [x.data_ptr() for x in self.leaves]
        self.pointers = (ctypes.c_void_p * leaves)(*addresses)
        order = postfix((0, leaves))
        self.order = (ctypes.c_int32 * len(order))(*order)

    def tree(self) -> tuple[int, int, int]:
        """Return the arguments that describe the sum."""
        pointers = ctypes.addressof(self.pointers)
        return pointers, ctypes.addressof(self.order), len(self.order)

    def vectors(self) -> list[Tensor]:
        """Return what an update changes."""
        return [self.parameters, self.first, self.second]


def pointers(tensors: Sequence[Tensor]) -> list[int]:
    """Return addresses."""
    return [x.data_ptr() for x in tensors]


def as_arguments(values: Sequence[Any]) -> list[Any]:
    """Return integers as ctypes passes them to a function without `argtypes`."""
    return [ctypes.c_void_p(x) if isinstance(x, int) else x for x in values]


SHAPES = {
    "leaves": st.sampled_from([1, 2, 3, 8, 13]),
    "size": st.sampled_from([0, 1, 15, 16, 37, 511, 512, 1300]),
    "seed": st.integers(0, 2**32),
    "by": st.integers(0, 15),
    "specials": st.sampled_from([0.0, 0.05]),
}


@settings(max_examples=60)
@given(
    **SHAPES,
    kind=st.sampled_from(OptimizerKind),
    flags=st.tuples(st.booleans(), st.booleans()),
    decay=st.sampled_from([0.0, 0.9]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_an_update_gives_the_bits_of_the_reference(
    reference: ctypes.CDLL,
    leaves: int,
    size: int,
    seed: int,
    by: int,
    specials: float,
    kind: OptimizerKind,
    flags: tuple[bool, bool],
    decay: float,
    momentum: float,
) -> None:
    """Every optimizer with every instruction set."""
    how = Optimizer(kind=kind, nesterov=flags[0], is_first=flags[1], **NUMBERS)
    how.weight_decay = decay
    if kind == OptimizerKind.SGD:
        how.beta1 = momentum
    plain = Arrays(leaves, size, seed, by, specials)
    arguments = [ctypes.addressof(how), *plain.tree(), *pointers(plain.vectors()), size]
    reference.reference_update(*as_arguments(arguments))
    for isa in supported_isas():
        own = Arrays(leaves, size, seed, by, specials)
        kernels = load_kernels(isa)
        kernels.update(
            *(ctypes.addressof(how), *own.tree(), *pointers(own.vectors())),
            *(0, size, None),
        )
        for x, y in zip(own.vectors(), plain.vectors(), strict=True):
            assert torch.equal(bits(x), bits(y)), isa


@settings(max_examples=30)
@given(**SHAPES)
def test_a_sum_up_the_tree_may_replace_a_leaf(
    reference: ctypes.CDLL, leaves: int, size: int, seed: int, by: int, specials: float
) -> None:
    """And has the bits of the reference."""
    plain = Arrays(leaves, size, seed, by, specials)
    out = torch.zeros(size)
    arguments = [out.data_ptr(), *plain.tree(), size]
    reference.reference_tree_sum(*as_arguments(arguments))
    for isa in supported_isas():
        own = Arrays(leaves, size, seed, by, specials)
        to = own.leaves[seed % leaves]
        load_kernels(isa).tree_sum(to.data_ptr(), *own.tree(), size)
        assert torch.equal(bits(to), bits(out)), isa


@settings(max_examples=30)
@given(**SHAPES)
def test_averages_and_scaled_vectors_have_the_bits_of_the_reference(
    reference: ctypes.CDLL, leaves: int, size: int, seed: int, by: int, specials: float
) -> None:
    """`average` against C, `scale` against torch, whose product is exact too."""
    plain = Arrays(1, size, seed, by, specials)
    reference.reference_average(
        *pointers(plain.vectors()[:2]), 0.3, ctypes.c_int64(size)
    )
    for isa in supported_isas():
        own, kernels = Arrays(1, size, seed, by, specials), load_kernels(isa)
        kernels.average(*pointers(own.vectors()[:2]), 0.3, size)
        assert torch.equal(bits(own.parameters), bits(plain.parameters)), isa
        scaled = own.first * 0.3
        kernels.scale(own.first.data_ptr(), 0.3, size)
        assert torch.equal(bits(own.first), bits(scaled)), isa


@settings(max_examples=20)
@given(blocks=st.integers(0, 3), seed=st.integers(0, 2**32), by=st.integers(0, 15))
def test_squared_norms_have_the_bits_of_the_reference(
    reference: ctypes.CDLL, blocks: int, seed: int, by: int
) -> None:
    """A block has 1,024 elements; the sums are in double."""
    vector = Arrays(1, blocks * 1024, seed, by, 0.0).parameters
    expected, found = torch.zeros(2, blocks, dtype=torch.float64)
    arguments = [vector.data_ptr(), expected.data_ptr(), blocks]
    reference.reference_squared_norms(*as_arguments(arguments))
    for isa in supported_isas():
        load_kernels(isa).squared_norms(vector.data_ptr(), found.data_ptr(), blocks)
        assert torch.equal(found, expected), isa


def test_adam_goes_as_that_of_torch_up_to_rounding() -> None:
    """Three steps with weight decay."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(100, generator=draw).requires_grad_()
    own = weight.detach().clone()
    first, second = torch.zeros(2, 100)
    theirs = torch.optim.Adam([weight], lr=1e-2, weight_decay=1e-2)
    for t in (1, 2, 3):
        weight.grad = torch.randn(100, generator=draw)
        leaf = (ctypes.c_void_p * 1)(weight.grad.data_ptr())
        how = Optimizer(kind=OptimizerKind.ADAM, weight_decay=1e-2, **NUMBERS)
        how.lr, how.root = 1e-2 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5
        load_kernels().update(
            *(ctypes.addressof(how), ctypes.addressof(leaf)),
            *(ctypes.addressof(ctypes.c_int32(0)), 1),
            *pointers([own, first, second]),
            *(0, 100, None),
        )
        theirs.step()
    assert torch.allclose(own, weight, atol=1e-6)
