"""The workers of one generation agree on a name, whatever earlier ones have left."""

import json
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from samestep.elastic.membership import ROOT, Roster
from samestep.errors import PeerLost


def agree(
    store: HashStore, ranks: list[int], workers: int, order: list[int]
) -> list[str]:
    """Return the names that fresh workers find, one after another in any order."""
    rosters = {rank: Roster(store, rank, workers) for rank in ranks}
    done: dict[int, str] = {}
    for rank in [*order, *ranks * 4]:
        rank = ranks[rank % len(ranks)]
        if rank not in done and rosters[rank].look():
            done[rank] = rosters[rank].name
    return [done[rank] for rank in sorted(done)]


orders = st.lists(st.integers(0, 7), max_size=30)


@settings(max_examples=60)
@given(
    generations=st.lists(st.tuples(st.integers(1, 5), orders, orders), min_size=2),
)
def test_every_generation_agrees_on_a_name_that_no_other_had(
    generations: list[tuple[int, list[int], list[int]]],
) -> None:
    """Before each, workers of a generation come that dies before it is complete."""
    store, names = HashStore(), set()
    for workers, lost, order in generations:
        agree(store, list(range(workers))[: workers - 1] or [0], workers + 1, lost)
        found = agree(store, list(range(workers)), workers, order)
        assert len(found) == workers
        assert len(set(found)) == 1
        assert found[0] not in names
        names.add(found[0])


def test_workers_that_look_at_the_same_time_agree() -> None:
    store, names = HashStore(), []
    store.set(f"{ROOT}/nonce/3", "of an earlier worker")
    store.set(f"{ROOT}/roster", json.dumps(["a", "b", "c", "of an earlier worker"]))

    def join(rank: int) -> None:
        names.append(Roster(store, rank, 4, seconds=20).agree())

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 4
    assert len(set(names)) == 1


def test_an_earlier_worker_that_writes_late_is_overwritten() -> None:
    store = HashStore()
    first, second = (Roster(store, rank, 2) for rank in range(2))
    assert not second.look()
    store.set(f"{ROOT}/nonce/1", "of an earlier worker")
    looks = [False]
    for _ in range(9):
        looks = [first.look(), second.look()]
    assert looks == [True, True]
    assert first.name == second.name


def test_whoever_does_not_come_is_named() -> None:
    with pytest.raises(PeerLost, match="missing: worker 1, 2"):
        Roster(HashStore(), 0, 3, pause=lambda: None, seconds=0.05).agree()
