"""Snapshots: whole or not there, whoever dies while one is written."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import small_recipe
from hypothesis import given
from hypothesis import strategies as st
from phases import alone

from samestep.errors import PlacementError
from samestep.messages.training import Message, WorkerWarning
from samestep.state.layout import Entry, Floats, Layout
from samestep.state.snapshot import Snapshots, State
from samestep.system import shared_memory
from samestep.training import trainer as training


LAYOUTS = st.builds(
    Layout,
    parameters=st.lists(
        st.builds(
            Entry,
            name=st.text("abc.", min_size=1, max_size=5),
            shape=st.lists(st.integers(1, 40), max_size=3).map(tuple),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    buffers=st.just((Entry(name="mean", shape=(5,)),)) | st.just(()),
    states=st.lists(st.sampled_from("abc"), unique=True).map(tuple),
    dtype=st.sampled_from(["float32", "float64"]),
)


def state_of(layout: Layout, step: int) -> State:
    """Numbers that differ between steps."""
    random = np.random.default_rng(step)

    def floats(*shape: int) -> Floats:
        return random.standard_normal(shape, np.dtype(layout.dtype).type)

    size = layout.size
    return State(
        {"step": step, "epochs": 0, "loss": 1 / (step + 1)},
        floats(size),
        floats(len(layout.states), size),
        floats(layout.tail),
    )


@contextmanager
def snapshots_of(layout: Layout, workers: int) -> Iterator[tuple[Snapshots, int]]:
    fd = shared_memory.create()
    try:
        yield Snapshots(fd, layout, workers), fd
    finally:
        os.close(fd)


def save(snapshots: Snapshots, layout: Layout, state: State, ranks: list[int]) -> int:
    """Save the parts of some workers; each would do it in its own process."""
    slot, start = 0, snapshots._next
    for rank in ranks:
        snapshots._next = start
        first, end = layout.slices(len(snapshots._slices))[rank]
        rest = (state.tail, state.progress) if rank == 0 else None
        parameters, states = state.parameters[first:end], state.states[:, first:end]
        slot = snapshots.save(rank, parameters, list(states), state.step, rest)
    return slot


def same(one: State | None, other: State) -> bool:
    return (
        one is not None
        and one.progress == other.progress
        and np.array_equal(one.parameters, other.parameters)
        and np.array_equal(one.states, other.states)
        and np.array_equal(one.tail, other.tail)
    )


@given(LAYOUTS, st.integers(1, 6))
def test_what_all_workers_saved_is_read_back(layout: Layout, workers: int) -> None:
    with snapshots_of(layout, workers) as (snapshots, fd):
        assert snapshots.newest() is None
        for step in (3, 9, 12):
            save(snapshots, layout, state_of(layout, step), list(range(workers)))
            assert same(Snapshots(fd, layout, workers).newest(), state_of(layout, step))


@given(LAYOUTS, st.integers(2, 5), st.data())
def test_a_worker_that_dies_while_saving_leaves_the_state_before(
    layout: Layout, workers: int, data: st.DataObject
) -> None:
    ranks = list(range(workers))
    with snapshots_of(layout, workers) as (snapshots, _):
        for step in (1, 2):
            save(snapshots, layout, state_of(layout, step), ranks)
        some = data.draw(st.lists(st.sampled_from(ranks), unique=True, max_size=1))
        save(snapshots, layout, state_of(layout, 3), some)
        found = snapshots.newest()
        assert found is not None
        assert same(found, state_of(layout, found.step))
        assert found.step == 2


@given(LAYOUTS, st.integers(1, 4), st.integers(1, 4))
def test_another_number_of_workers_goes_on_from_a_filled_state(
    layout: Layout, before: int, after: int
) -> None:
    state = state_of(layout, 7)
    with snapshots_of(layout, before) as (old, _), snapshots_of(layout, after) as new:
        old.fill(state)
        found = old.newest()
        assert found is not None
        new[0].fill(found)
        worker = Snapshots(new[1], layout, after)
        assert same(worker.follow(), state)
        slot = save(worker, layout, state_of(layout, 8), list(range(after)))
        assert same(worker.read(1 - slot), state)  # the one before is untouched


@given(st.integers(0, 2**31), st.integers(0, 7))
def test_a_flipped_bit_is_noticed(position: int, bit: int) -> None:
    layout = Layout(
        parameters=(Entry(name="w", shape=(3, 5)),),
        buffers=(Entry(name="m", shape=(2,)),),
        states=("s",),
    )
    state = state_of(layout, 4)
    with snapshots_of(layout, 2) as (snapshots, _):
        snapshots.fill(state)
        half = len(snapshots._map) // 2
        snapshots._map[position % half] ^= 1 << bit
        found = snapshots.newest()
        assert found is None or same(found, state)


def test_memory_that_is_short_is_an_error_that_says_what_to_do() -> None:
    layout = Layout(parameters=(Entry(name="w", shape=(2**38,)),))
    fd = shared_memory.create()
    with pytest.raises(
        PlacementError, match=r"two snapshots .* MB .* Free some memory"
    ):
        Snapshots(fd, layout, 1)
    os.close(fd)


def test_a_snapshot_to_keep_that_is_not_copied_in_time_is_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody copies here; the training goes on, and waits for that one no more."""
    monkeypatch.setattr(training, "COPY_SECONDS", 0.0)
    trainer, said = alone(small_recipe()), list[Message]()
    trainer.report, trainer.kept = said.append, frozenset({11})
    trainer.progress.step = 11
    trainer.save()
    assert said == []
    trainer.progress.step = 12
    for _ in range(2):
        trainer.save()
    (warning,) = said
    assert isinstance(warning, WorkerWarning)
    assert "must copy the snapshot of step 11, whose checkpoint" in warning.text
