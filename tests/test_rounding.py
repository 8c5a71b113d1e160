import os
import threading
from itertools import pairwise

import pytest
import torch
from conftest import Train, small_recipe
from hypothesis import given
from hypothesis import strategies as st
from test_exactness import results
from torch import Tensor, nn

from samestep import NonFiniteGradient, Recipe
from samestep.core import tree
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange.compression import DTYPES, Compression
from samestep.exchange.gloo import GlooExchange
from samestep.exchange.shared import SharedExchange
from samestep.state.flat import Flat
from samestep.system import barrier
from samestep.system.barrier import Waits


def by_hand(leaves: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the rounded sum as the recipe's field says, in plain torch."""

    def value(node: Range) -> Tensor:
        if node[1] - node[0] == 1:
            return leaves[node[0]].to(dtype).float()
        middle = tree.split(node)
        return (value((node[0], middle)) + value((middle, node[1]))).to(dtype).float()

    return value((0, len(leaves)))


def summed(
    exchange: GlooExchange | SharedExchange,
    flat: Flat,
    leaves: list[Tensor],
    owned: Range,
) -> Tensor:
    """Take one worker's steps, with given gradients instead of backward passes."""
    for leaf in range(*owned):
        gradients = flat.views(leaves[leaf])
        with exchange.accumulate(leaf):
            for parameter, gradient in zip(flat.parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        exchange.after_backward(leaf)
    return exchange.sum()[0]


@st.composite
def ownerships(draw: st.DrawFn) -> list[Range]:
    num_leaves = draw(st.integers(1, 12))
    inner = draw(st.lists(st.integers(0, num_leaves), max_size=3))
    return list(pairwise([0, *sorted(inner), num_leaves]))


def gradients(flat: Flat, num_leaves: int, seed: int) -> list[Tensor]:
    """Numbers of many magnitudes; padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.zeros(flat.size) for _ in range(num_leaves)]
    for leaf in leaves:
        for view in flat.views(leaf):
            exponents = torch.randint(-30, 5, view.shape, generator=generator)
            view.copy_(torch.randn(view.shape, generator=generator) * 2.0**exponents)
    return leaves


@given(ownerships(), st.sampled_from(sorted(DTYPES)), st.integers(0, 99))
def test_the_sum_is_that_of_the_rounded_tree(
    shares: list[Range], compression: str, seed: int
) -> None:
    rounding, workers = Compression.of(compression), len(shares)
    model = nn.Linear(40, 50)
    flat = Flat(model)
    leaves = gradients(flat, shares[-1][1], seed)
    expected = by_hand(leaves, rounding.sent_as(torch.float32))

    alone = Topology.on_one_node(0, 1)
    whole = GlooExchange(flat, [(0, len(leaves))], alone, rounding)
    assert torch.equal(summed(whole, flat, leaves, (0, len(leaves))), expected)

    fd = barrier.create(workers)
    flats = [Flat(nn.Linear(40, 50)) for _ in shares]
    places = [Topology.on_one_node(rank, workers) for rank in range(workers)]
    exchanges = [
        SharedExchange(flats[rank], shares, topology, fd, Waits(1e-5, 10.0), rounding)
        for rank, topology in enumerate(places)
    ]
    os.close(fd)
    found: dict[int, Tensor] = {}

    def work(rank: int) -> None:
        args = exchanges[rank], flats[rank], leaves, shares[rank]
        found[rank] = summed(*args).clone()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert torch.equal(torch.cat([found[r] for r in range(workers)]), expected)


@pytest.mark.parametrize("compression", ["bf16", "fp16"])
def test_rounding_is_the_same_at_any_place_and_alignment(compression: str) -> None:
    rounding = Compression.of(compression)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (5_000,), generator=generator)
    values = bits.to(torch.int32).view(torch.float32)
    values = values[values.isfinite() & (values.abs() > 2.0**-126)]
    whole = rounding(values.clone())
    assert torch.equal(rounding(whole.clone()), whole)
    for start in range(40):
        assert torch.equal(rounding(values[start:].clone()), whole[start:])
    for at in range(100):
        assert torch.equal(rounding(values[at : at + 1].clone()), whole[at : at + 1])


@pytest.mark.parametrize(
    ("compression", "overrides"),
    [("bf16", {"model__norm": "batch"}), ("fp16", {"optimizer__max_grad_norm": 0.1})],
)
def test_compressed_the_result_is_the_same_at_any_placement(
    train: Train, compression: str, overrides: dict[str, object]
) -> None:
    recipe = small_recipe(compression=compression, **overrides)
    alone = results(train(recipe, 1))
    assert results(train(recipe, 1, exchange="gloo")) == alone
    for workers in (2, 3, 4):
        for exchange in ("shared", "gloo"):
            assert results(train(recipe, workers, exchange=exchange)) == alone


def test_compressed_half_the_bytes_are_exchanged_and_it_learns_as_well(
    train: Train,
) -> None:
    plain, half = (
        train(recipe, 2, exchange="gloo", balance="off")  # uneven: other bytes
        for recipe in (
            small_recipe(compression=name, epochs=3) for name in ("none", "bf16")
        )
    )
    for full, less in zip(plain.history, half.history, strict=True):
        assert less["bytes_exchanged"] * 2 == full["bytes_exchanged"] > 0
    assert half.weights_sha256 != plain.weights_sha256
    assert half.result["test_accuracy"] > plain.result["test_accuracy"] - 0.02


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_what_fp16_cannot_hold_ends_the_training_with_the_remedy(
    train: Train, exchange: str
) -> None:
    recipe = small_recipe(
        compression="fp16", optimizer={"name": "sgd", "lr": 1e8}, model__dropout=0.0
    )
    with pytest.raises(NonFiniteGradient, match='Use `compression = "bf16"`'):
        train(recipe, 2, exchange=exchange)


def test_a_recipe_without_compression_has_the_digest_that_it_had() -> None:
    recipe = Recipe.load("mnist-mlp", {"arithmetic": "torch"})
    assert recipe.digest == (
        "87b420025568100ae194dc142746205768d3ad48e18e1288e1bf49ca59b0c72b"
    )
    compressed = recipe.changed({"compression": "bf16"})
    assert compressed.digest != recipe.digest
    assert compressed.changed({"compression": "none"}).digest == recipe.digest
