"""What machines conclude from what they know of each other, and how a state travels."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_checkpoint import LAYOUT, RECIPE, state_of
from torch._C._distributed_c10d import HashStore

from samestep.elastic.consensus import Agreement, NodeStatus, agree, is_writer
from samestep.elastic.node_state import Held
from samestep.elastic.state_transfer import Courier
from samestep.errors import PlacementError, ReplicasDiffer
from samestep.output import ledger


def facts(*steps: int, **fields: Any) -> list[NodeStatus]:
    """Machines that hold states after these steps; -1: none."""
    return [
        NodeStatus(f"host-{n}", step=step, sees=[n], interface="eth0", **fields)
        for n, step in enumerate(steps)
    ]


def test_the_newest_state_goes_to_all_who_lack_it() -> None:
    nodes = [
        replace(fact, generation=generation)
        for fact, generation in zip(facts(7, 40, -1, 40), (2, 5, 0, 5), strict=True)
    ]
    assert agree(nodes) == Agreement(generation=6, step=40, donor=1, receivers=[0, 2])


def test_ledgers_come_from_a_machine_that_has_recorded_all_steps() -> None:
    """Also to those whose record is of other workers; bits do not depend on it."""
    nodes = facts(40, 40, 40, 40, 7)
    whole, other = {"ledger": "aa", "hashes": "bb"}, {"ledger": "aa", "hashes": "cc"}
    recorded = [{"ledger": "aa", "hashes": ""}, whole, {"ledger": "aa"}, other, whole]
    nodes = [replace(n, ledgers=r) for n, r in zip(nodes, recorded, strict=True)]
    agreed = agree(nodes)
    assert (agreed.donor, agreed.receivers) == (1, [0, 2, 3, 4])
    assert set(agreed.ledgers) == {"ledger", "hashes"}
    assert not agree([replace(n, step=0) for n in nodes]).ledgers


def test_without_any_state_all_begin_at_the_beginning() -> None:
    assert agree(facts(-1, -1)) == Agreement(1, step=0, donor=0, receivers=[])


def test_what_differs_is_listed_by_host() -> None:
    conditions = {"torch": "2.13.0", "data x.npy": "aa", "recipe seed": "0"}
    nodes = facts(-1, -1, -1, conditions=conditions)
    nodes[1] = replace(nodes[1], conditions=conditions | {"torch": "2.14.0"})
    nodes[2] = replace(nodes[2], conditions={"torch": "2.13.0", "recipe seed": "0"})
    with pytest.raises(PlacementError) as raised:
        agree(nodes)
    assert "torch: 2.13.0 on host-0, host-2 and 2.14.0 on host-1" in str(raised.value)
    assert "data x.npy: aa on host-0, host-1 and nothing on host-2" in str(raised.value)
    assert "seed" not in str(raised.value)


def test_whoever_cannot_take_part_is_named_with_the_reason() -> None:
    nodes = [*facts(-1), NodeStatus("host-1", error="There is no x.npy.")]
    with pytest.raises(PlacementError, match=r"host-1: There is no x\.npy\."):
        agree(nodes)


def test_states_of_one_step_that_differ_are_an_error() -> None:
    nodes = facts(-1, 5, 5)
    nodes[2] = replace(nodes[2], checksum=1)
    with pytest.raises(
        ReplicasDiffer,
        match="after step 5; the checksums are 00000000 on host-1, 000000",
    ):
        agree(nodes)


def test_the_checksum_of_a_state_is_over_all_that_decides_the_next_steps() -> None:
    state = state_of(5)
    held = Held(state, LAYOUT, RECIPE, {}, [], "")
    others = [
        replace(state, tail=state.tail + 1),
        replace(state, states=state.states + 1),
        replace(state, parameters=state.parameters + 1),
        replace(state, progress=state.progress | {"counts": [9]}),
    ]
    checksums = {replace(held, state=one).checksum for one in [state, *others]}
    assert len(checksums) == 5
    later = state.progress | {"seconds": 99.0, "phases": [1.0] * 7}
    later["micro_batch_hashes"] = "01" * 16  # has the numbers of workers
    same = replace(held, state=replace(state, progress=later))
    assert same.checksum == held.checksum


def test_several_hosts_must_say_which_network_is_between_them() -> None:
    nodes = [replace(fact, interface="", interfaces="lo, eth0") for fact in facts(0, 0)]
    with pytest.raises(PlacementError, match="host-0 has lo, eth0; host-1 has"):
        agree(nodes)
    agree([replace(fact, host="one machine") for fact in nodes])


def test_the_lowest_of_those_who_share_a_directory_writes_it() -> None:
    nodes = facts(0, 0, 0)
    nodes = [replace(nodes[0], sees=[0, 2]), nodes[1], replace(nodes[2], sees=[0, 2])]
    assert [is_writer(nodes, node) for node in range(3)] == [True, True, False]


@pytest.mark.parametrize("metrics", ["", '{"type": "step", "step": 1}\n'])
def test_a_state_arrives_as_it_was_sent(
    metrics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    build, epochs = {"torch": "x"}, [{"epoch": 1}]
    ledgers = {ledger.FILE: b"\x00\xff", ledger.MICRO_BATCHES: b"12"} if metrics else {}
    held = Held(state_of(5), LAYOUT, RECIPE, build, epochs, metrics, ledgers)
    store = HashStore()

    def join(node: int) -> Held:
        courier = Courier(store, node, 3, 20.0)
        if node == 1:
            courier.send(held, [0, 2])
            return held
        return courier.receive(1)

    with ThreadPoolExecutor(3) as threads:
        received = list(threads.map(join, range(3)))
    for one in received:
        assert one.checksum == held.checksum
        assert one.state.progress == held.state.progress
        assert np.array_equal(one.state.states, held.state.states)
        assert replace(one, state=held.state) == held
