import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_recipe
from torch import nn
from torch._C._distributed_c10d import HashStore

from samestep import Placement, PlacementError, Recipe, WorkerLate
from samestep.core.ownership import shares
from samestep.core.topology import Topology
from samestep.exchange.compression import EXACT
from samestep.exchange.factory import Connection
from samestep.exchange.shared import SharedExchange
from samestep.models.layers import Linear, dropout_masks
from samestep.state.flat import Flat
from samestep.supervisor.job import make_setup
from samestep.system import barrier
from samestep.system.barrier import Waits


CPU = torch.device("cpu")
SOAK = Path(__file__).with_name("soak.py")


@pytest.mark.parametrize(
    ("workers", "steps", "micro_batches"),
    [(2, 4000, 5), (3, 4000, 5), (5, 2000, 5), (2, 2000, 4)],
)
def test_ten_thousand_exchanges_with_random_delays_agree(
    workers: int, steps: int, micro_batches: int
) -> None:
    fd = barrier.create(workers)
    try:
        soak = subprocess.run(
            [sys.executable, SOAK, *map(str, (workers, fd, steps, 7, micro_batches))],
            pass_fds=[fd],
            stdout=subprocess.PIPE,
            timeout=240,
            check=True,
        )
    finally:
        os.close(fd)
    assert soak.stdout == f"{steps}\n".encode() * workers


def exchange_of(rank: int, workers: int, fd: int, timeout: float) -> SharedExchange:
    owned = shares(workers, workers)
    flat = Flat(nn.Linear(9, 9), ["exp_avg", "exp_avg_sq"])
    topology = Topology.on_one_node(rank, workers)
    return SharedExchange(flat, owned, topology, fd, Waits(1e-5, timeout))


def test_a_barrier_names_all_who_are_late() -> None:
    fd = barrier.create(4)
    exchanges = [exchange_of(rank, 4, fd, timeout=0.5) for rank in range(4)]
    errors: list[str] = []

    def wait(rank: int) -> None:
        with pytest.raises(WorkerLate) as caught:
            exchanges[rank].all_gather_parameters()
        errors.append(str(caught.value))

    threads = [threading.Thread(target=wait, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    os.close(fd)
    assert len(errors) == 2
    assert all("late: worker 1, 3." in error for error in errors)


def test_who_has_the_whole_sum_lets_the_others_read_before_it_writes_again() -> None:
    fd = barrier.create(2)
    exchanges = [exchange_of(rank, 2, fd, timeout=0.5) for rank in range(2)]
    os.close(fd)
    first, other = exchanges
    for rank, exchange in enumerate(exchanges):
        exchange.accumulate(rank)
        exchange.after_backward(rank)
    reading = threading.Thread(target=other.gather)  # it has not read to the end
    reading.start()
    first.whole_sum()
    reading.join(10)
    with pytest.raises(WorkerLate, match="late: worker 1"):
        first.accumulate(0)


def test_the_optimizer_state_of_a_machine_does_not_grow_with_its_workers() -> None:
    sizes = set()
    for workers in (1, 2, 3, 8):
        fd = barrier.create(workers)
        exchanges = [exchange_of(rank, workers, fd, 1.0) for rank in range(workers)]
        sizes.add(sum(sum(map(len, exchange.states)) for exchange in exchanges))
        os.close(fd)
    assert len(sizes) == 1


def test_a_barrier_of_one_worker_waits_for_nobody() -> None:
    fd = barrier.create(1)
    exchange_of(0, 1, fd, timeout=0.1).all_gather_parameters()
    os.close(fd)


@pytest.mark.parametrize("workers", range(1, 10))
def test_a_barrier_takes_the_logarithm_of_the_workers_in_rounds(workers: int) -> None:
    rounds = barrier.num_rounds(workers)
    assert 2**rounds >= workers
    assert rounds == 0 or 2 ** (rounds - 1) < workers


def test_without_shared_memory_auto_takes_gloo_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(workers: int) -> int:
        raise OSError("no space left on /dev/shm")

    recipe = Recipe.load("mnist-mlp")
    monkeypatch.setattr(barrier, "create", refuse)
    placement, why = Placement(workers=2).resolve(recipe.micro_batches)
    assert placement.exchange == "gloo"
    assert "gloo (no shared memory: no space left on /dev/shm)" in why
    with pytest.raises(PlacementError, match=r"no space left.*Use `--exchange gloo`"):
        Placement(workers=2, exchange="shared").resolve(recipe.micro_batches)


def test_a_layer_that_is_used_twice_has_the_sum_of_its_gradients() -> None:
    torch.manual_seed(0)
    layer = Linear(6, 6)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    inputs = torch.randn(4, 6)
    twice(inputs).sum().backward()
    assert layer.weight.grad is not None
    expected = layer.weight.grad.clone()
    layer.weight.grad = layer.bias.grad = None

    fd, topology = barrier.create(1), Topology.on_one_node(0, 1)
    exchange = SharedExchange(Flat(twice), [(0, 1)], topology, fd, Waits(0.0, 1.0))
    os.close(fd)
    exchange.attach(twice)
    with exchange.accumulate(0):
        twice(inputs).sum().backward()
    exchange.after_backward(0)
    gradient, _ = exchange.sum()
    assert torch.allclose(gradient[:36].view(6, 6), expected)


def test_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    masks = dropout_masks(0.2, 1000, [1001, 500], CPU)
    assert [mask.shape for mask in masks] == [(1000, 1001), (1000, 500)]
    for mask in masks:
        assert sorted(set(mask.flatten().tolist())) == pytest.approx([0, 256 / 205])
        assert mask.double().mean().item() == pytest.approx(1, abs=0.003)
    columns = (masks[0] == 0).double().mean(dim=0)
    assert columns.min() > 0.13
    assert columns.max() < 0.27


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_layer_has_the_gradients_of_its_parts(masked: bool) -> None:
    torch.manual_seed(0)
    layer = Linear(7, 5)
    mask = dropout_masks(0.5, 4, [5], CPU)[0] if masked else None
    found = []
    for sink in (None, lambda _: None):
        layer.gradient_sink = sink
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
        inputs.requires_grad_()
        outputs = layer.activate(inputs, mask)
        torch.autograd.backward((outputs * torch.arange(5)).sum())
        found.append([outputs, inputs.grad, layer.weight.grad, layer.bias.grad])
        layer.weight.grad = layer.bias.grad = None
    for plain, fused in zip(*found, strict=True):
        assert plain is not None
        assert fused is not None
        assert torch.allclose(plain, fused)


def test_a_wait_for_a_late_worker_sleeps() -> None:
    fd = barrier.create(2)
    exchange = exchange_of(0, 2, fd, timeout=2.0)
    os.close(fd)
    computed, waited = time.process_time(), time.monotonic()
    with pytest.raises(WorkerLate):
        exchange.all_gather_parameters()
    computed, waited = time.process_time() - computed, time.monotonic() - waited
    assert computed < waited / 2


def test_who_does_not_come_to_the_exchange_is_named() -> None:
    """After `start_seconds`, which is for the loading of data."""
    topology = Topology.on_one_node(0, 3)
    store = HashStore()
    store.set("built/2", "")
    setup = make_setup(small_recipe(), Placement(workers=3, exchange="gloo"))
    connection = Connection(
        setup=replace(setup, start_timeout=0.2, peer_timeout=0.1),
        topology=topology,
        compression=EXACT,
        memory=None,
        store=lambda: store,
    )
    flat = Flat(nn.Linear(2, 2))
    with pytest.raises(WorkerLate, match=r"within 0\.3 s; late: worker 1\..*start-tim"):
        connection(flat, [(0, 1), (1, 2), (2, 3)])
