"""Several machines, the same bits: real processes that talk over real sockets."""

import os
import threading
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from conftest import Own, Train, small_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import machines
from test_exactness import results
from test_rounding import by_hand, gradients
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from samestep import Placement
from samestep.core.topology import Topology
from samestep.core.tree import Range
from samestep.exchange.compression import DTYPES, Compression
from samestep.exchange.factory import Connection
from samestep.exchange.hierarchical import ExchangePlan, NodesExchange
from samestep.messages.training import Started, Stopped
from samestep.state.flat import Flat
from samestep.state.layout import ALIGNMENT, Layout
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.system import barrier, machine
from samestep.system.fault_injection import Fault
from samestep.system.heartbeat import Heartbeat
from samestep.training.cadence import Decision
from samestep.training.metrics import MetricsBuffer
from samestep.training.timing import PHASES


@pytest.mark.parametrize(
    ("sizes", "overrides", "fields"),
    [
        ([2, 2], {"micro_batches": 8}, {}),
        ([1, 1, 1], {"micro_batches": 7, "optimizer__max_grad_norm": 0.05}, {}),
        ([3, 1], {"micro_batches": 12, "model__norm": "batch"}, {}),
        ([1, 2, 1, 1], {"model__norm": "batch", "compression": "bf16"}, {}),
        ([1, 3, 2], {"micro_batches": 7, "compression": "fp16"}, {"balance": "random"}),
        ([1, 1, 1, 1], {"model__norm": "batch"}, {"balance": "random"}),
        ([2, 1], {"micro_batches": 7}, {"exchange": "gloo"}),
        ([1, 2], {"precision": "float64", "model__norm": "batch"}, {}),
        (
            [2, 1, 1],
            {"arithmetic": "portable", "micro_batches": 7, "model__norm": "batch"},
            {"balance": "random"},
        ),
    ],
)
def test_several_nodes_give_the_result_of_one(
    train: Train,
    server: ForkServer,
    tmp_path: Path,
    sizes: list[int],
    overrides: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    recipe = small_recipe(**overrides)
    alone = results(train(recipe))
    with machines(server, tmp_path, recipe, sizes, **fields) as played:
        played.listen()
    assert [results(run) for run in played.runs()] == [alone] * len(sizes)
    for run in played.runs():
        (epoch,) = run.history
        assert 0 < epoch["network_bytes"] <= epoch["bytes_exchanged"]


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_a_stop_on_any_node_ends_all_and_each_holds_the_whole_state(
    server: ForkServer, tmp_path: Path, exchange: Literal["shared", "gloo"]
) -> None:
    recipe = small_recipe(epochs=50, model__norm="batch")
    with machines(server, tmp_path, recipe, [1, 2], exchange) as played:
        Heartbeat(played.nodes[1].heartbeat).request_stop()
        played.listen()
        ((started,), _) = played.of_leaders(Started)
        layout = Layout.model_validate(started.layout)
        states = [node.state(layout) for node in played.nodes]
    first, second = states
    assert first is not None
    assert second is not None
    assert 0 < first.step == second.step < 500
    for name in ("parameters", "states", "tail"):
        assert (getattr(first, name) == getattr(second, name)).all()
    (stopped,), (also,) = played.of_leaders(Stopped)
    assert stopped.step == also.step == first.step


@pytest.mark.parametrize(
    ("rank", "named"),
    [
        (1, {0: "late: node 1 (workers 1, 2)", 2: "late: worker 1."}),
        (2, {0: "late: node 1 (workers 1, 2)", 1: "late: worker 2."}),
    ],
)
def test_who_waits_for_a_stopped_worker_names_it(
    server: ForkServer, tmp_path: Path, rank: int, named: dict[int, str]
) -> None:
    fault = Fault(number=0, kind="stop", point="exchange", step=5, rank=rank)
    recipe = small_recipe(epochs=9)
    args = server, tmp_path, recipe, [1, 2]
    with machines(*args, faults=[fault], peer_timeout=3.0) as played:
        played.listen(stuck=[rank])
    for worker, name in named.items():
        failed = played.failure(worker)
        # Whoever gives up first closes its connections.
        assert name in failed.message or failed.error == "PeerLost"
    names = [played.failure(worker).message for worker in named]
    assert any(name in said for name, said in zip(named.values(), names, strict=True))


def test_who_loses_a_node_names_it(server: ForkServer, tmp_path: Path) -> None:
    fault = Fault(number=0, kind="kill", point="exchange", step=5, rank=1)
    recipe = small_recipe(epochs=9)
    with machines(server, tmp_path, recipe, [1, 1], faults=[fault]) as played:
        played.listen()
    failed = played.failure(0)
    assert failed.error == "PeerLost"
    assert "The connection to node 1 (worker 1) ended" in failed.message


COMPILES_LATE = """
import os
import time

from samestep.models import compiling

def load():
    return some()

def build(inputs, outputs):
    if os.environ["RANK"] == "1":
        compiling.prepare = lambda *_: time.sleep(4)
    else:
        compiling.prepare = lambda *_: None
    return nn.Linear(*inputs, outputs)
"""


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_compiling_may_take_longer_than_a_step(
    server: ForkServer, tmp_path: Path, own: Own, exchange: Literal["shared", "gloo"]
) -> None:
    recipe = own(COMPILES_LATE, compile=True)
    args = server, tmp_path, recipe, [1, 1], exchange
    with machines(*args, peer_timeout=2.0) as played:
        played.listen()
    first, second = played.runs()
    assert results(first) == results(second)


@st.composite
def ownerships(draw: st.DrawFn, most: int = 4) -> tuple[list[Range], list[int]]:
    """Draw what each worker owns, maybe nothing, and the workers of each node."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=most))
    num_leaves, inner = draw(st.integers(1, 12)), sum(sizes) - 1
    cuts = st.lists(st.integers(0, num_leaves), min_size=inner, max_size=inner)
    return list(pairwise([0, *sorted(draw(cuts)), num_leaves])), sizes


@given(ownerships(most=9), st.integers(1, 50_000))
def test_no_element_and_no_micro_batch_is_lost(
    ownership: tuple[list[Range], list[int]], lines: int
) -> None:
    shares, sizes = ownership
    length, count = ALIGNMENT * lines, len(sizes)
    plan = ExchangePlan.of(shares, sizes, length)
    ends = [0, *(end for _, end in plan.pieces)]
    assert plan.pieces == list(pairwise(ends))
    assert ends[-1] == length
    assert all(end % ALIGNMENT == 0 for end in ends)
    assert len(plan.pieces) == count
    leaves = [leaf for rows in plan.rows for row in rows for leaf in range(*row)]
    assert leaves == list(range(shares[-1][1]))
    assert [share for local in plan.owned for share in local] == shares
    rows = sum(map(len, plan.rows))
    sent = sum(plan.sent(node) for node in range(count))
    assert sent <= (rows + count - 1) * length
    if all(len(rows) == 1 for rows in plan.rows):
        assert sent == 2 * (count - 1) * length  # what a ring all-reduce sends


class Cluster:
    """The exchanges of all workers, each of which is a thread."""

    def __init__(
        self, shares: list[Range], sizes: list[int], compression: Compression
    ) -> None:
        self.flats = [
            Flat(nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50))) for _ in shares
        ]
        self.exchanges: list[NodesExchange | None] = [None] * len(shares)
        self.sent, self._shares, store = 0, shares, HashStore()
        memories = [barrier.create(size) for size in sizes]
        firsts = list(accumulate(sizes, initial=0))
        setup = make_setup(small_recipe(), Placement(workers=1, exchange="shared"))
        setup = replace(setup, start_timeout=0.0, peer_timeout=20.0, spin_seconds=1e-5)
        connections = [
            Connection(
                setup=setup,
                topology=Topology(
                    firsts[node] + local,
                    len(shares),
                    local,
                    size,
                    node=node,
                    nodes=len(sizes),
                ),
                compression=compression,
                memory=memories[node],
                store=lambda: store,
            )
            for node, size in enumerate(sizes)
            for local in range(size)
        ]

        def connect(rank: int) -> None:
            exchange = connections[rank](self.flats[rank], shares)
            assert isinstance(exchange, NodesExchange)
            self.exchanges[rank] = exchange

        self.all(connect)
        for fd in memories:
            os.close(fd)

    def all(self, work: Any) -> None:
        """Call a function for every worker at the same time."""
        threads = [
            threading.Thread(target=work, args=(rank,))
            for rank in range(len(self._shares))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert not any(thread.is_alive() for thread in threads)

    def sums(self, leaves: list[Tensor]) -> list[tuple[Range, Tensor]]:
        """Return what every worker gets."""
        found: list[tuple[Range, Tensor]] = [((0, 0), torch.empty(0))] * len(self.flats)

        def work(rank: int) -> None:
            exchange, flat = self.exchanges[rank], self.flats[rank]
            assert exchange is not None
            for leaf in range(*self._shares[rank]):
                with exchange.accumulate(leaf):
                    views = flat.views(leaves[leaf])
                    for parameter, gradient in zip(flat.parameters, views, strict=True):
                        parameter.grad = gradient.clone()
                exchange.after_backward(leaf)
            found[rank] = exchange.owned, exchange.sum()[0].clone()

        self.all(work)
        return found


@settings(max_examples=30)
@given(ownerships(), st.sampled_from(sorted(DTYPES)), st.integers(0, 99))
def test_the_nodes_sum_is_that_of_the_rounded_tree_and_sends_what_it_says(
    ownership: tuple[list[Range], list[int]], compression: str, seed: int
) -> None:
    with mock.patch.dict(os.environ, GLOO_SOCKET_IFNAME=machine.loopback()):
        check_sum_and_bytes(ownership, compression, seed)


def check_sum_and_bytes(
    ownership: tuple[list[Range], list[int]], compression: str, seed: int
) -> None:
    rounding = Compression.of(compression)
    cluster = Cluster(*ownership, rounding)
    flat, (shares, _) = cluster.flats[0], ownership
    leaves = gradients(flat, shares[-1][1], seed)
    expected = by_hand(leaves, rounding.sent_as(torch.float32))
    sent: list[tuple[Tensor, Tensor]] = []
    for exchange in cluster.exchanges:
        assert exchange is not None
        if exchange._leaders is not None:
            note_messages(exchange, sent)
    for (first, end), total in cluster.sums(leaves):
        assert torch.equal(total, expected[first:end])
    for exchange in cluster.exchanges:
        assert exchange is not None
        assert exchange.network_bytes_per_step == sum(had.nbytes for _, had in sent)
    for tensor, had in sent:  # nothing changes on its way
        assert torch.equal(tensor, had)


def note_messages(exchange: NodesExchange, sent: list[tuple[Tensor, Tensor]]) -> None:
    """Note every message to another node from now on, with a copy of its content."""
    leaders = exchange._leaders
    assert leaders is not None
    post = leaders._send

    def send(tensors: list[Tensor], node: int, tag: int) -> Any:
        sent.append((tensors[0], tensors[0].clone()))
        return post(tensors, node, tag)

    leaders._send = send


class Peer:
    """The other of two workers: at the first step it was ready 0.2 s after a merge."""

    workers = 2

    def merge(self, values: Tensor) -> Tensor:
        """Set its cell of the arrivals, after those of losses and metrics."""
        values[2 * 1 + 1] = 0.2
        return values


def test_clocks_of_several_machines_need_not_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moment = 1e6
    monkeypatch.setattr("time.perf_counter", lambda: moment)
    topology = Topology(0, 2, 0, 1, node=0, nodes=2)
    buffer = MetricsBuffer(1, 1, topology, Peer(), 1)  # type: ignore[arg-type]
    for _ in range(2):
        row = buffer.begin_step(0, 1)
        buffer.record(row, 0, 1.0, [1.0])
        buffer.arrive(row, moment + 0.5)
        moment += 3  # the merge ends
        phases = [float(phase == "exchange") for phase in PHASES]
        times = buffer.sync(phases, Decision(False, False, 1)).times
        assert times.waited_for.tolist() == pytest.approx([0.3, 0.0])
