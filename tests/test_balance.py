"""Who computes which micro-batches: optimal, stable under noise, no bit changed."""

import itertools
import json
import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from conftest import Own, Train, small_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import results

from samestep import Placement, PlacementError
from samestep.core import ownership, tree
from samestep.core.balancer import DEADBAND, Balancer, Change, random_ownership
from samestep.core.ownership import (
    Share,
    contiguous,
    efficiency,
    enough_micro_batches,
    fastest,
    makespan,
    shares,
)
from samestep.core.speeds import StepWindow
from samestep.training.cadence import Decision, num_cells


SPEEDS = st.lists(st.floats(0.01, 10), min_size=1, max_size=6)


def partials(owned: Sequence[Share], micro_batches: int) -> int:
    return sum(len(tree.subtrees(share, micro_batches)) for share in owned)


@given(st.integers(1, 64), SPEEDS)
def test_no_micro_batch_is_lost_or_owned_twice(
    micro_batches: int, speeds: list[float]
) -> None:
    owned = fastest(micro_batches, speeds)
    assert len(owned) == len(speeds)
    assert [m for share in owned for m in range(*share)] == list(range(micro_batches))
    assert owned == fastest(micro_batches, speeds)


@settings(max_examples=60)
@given(st.integers(1, 8), st.lists(st.floats(0.1, 10), min_size=1, max_size=3))
def test_it_is_the_best_of_all(micro_batches: int, speeds: list[float]) -> None:
    every = [
        contiguous(counts)
        for counts in itertools.product(range(micro_batches + 1), repeat=len(speeds))
        if sum(counts) == micro_batches
    ]
    chosen = fastest(micro_batches, speeds)
    least = min(makespan(owned, speeds) for owned in every)
    assert makespan(chosen, speeds) == pytest.approx(least, rel=1e-9)
    rivals = [
        owned for owned in every if makespan(owned, speeds) <= least * (1 + 1e-12)
    ]
    assert partials(chosen, micro_batches) == min(
        partials(owned, micro_batches) for owned in rivals
    )


def test_a_worker_without_speed_owns_nothing() -> None:
    assert fastest(8, [1.0, 0.0, 1.0]) == [(0, 4), (4, 4), (4, 8)]
    assert fastest(32, [1.0, 0.001]) == [(0, 32), (32, 32)]


def test_the_largest_remainder_would_not_be_the_best() -> None:
    assert [b - a for a, b in fastest(3, [1.0, 0.4, 0.4])] == [2, 1, 0]


def test_more_micro_batches_reach_more_of_the_possible_speed() -> None:
    speeds = [1.0, 0.52]
    assert efficiency(4, speeds) == pytest.approx(4 / 1.52 / 3)
    assert efficiency(64, speeds) > 0.97
    enough = enough_micro_batches(4, speeds, 0.95)
    assert efficiency(enough, speeds) >= 0.95
    assert efficiency(enough // 2, speeds) < 0.95


@given(st.integers(1, 40))
def test_no_owner_needs_a_deeper_stack_than_computed(num_leaves: int) -> None:
    deepest = 0
    for first, end in itertools.combinations(range(num_leaves + 1), 2):
        depth = 0
        for leaf in range(first, end):
            merges = tree.num_merges(leaf, (first, end), num_leaves)
            depth += 1 - merges
            deepest = max(deepest, depth)
    assert tree.deepest_stack(num_leaves) == deepest


def observed(balancer: Balancer, speeds: Sequence[float]) -> Change | None:
    """Observe 0.2 s of steps, at 1,000 times these speeds; return any change."""
    times = [
        (end - first) / (1000 * v)
        for (first, end), v in zip(balancer.owned, speeds, strict=True)
    ]
    steps = max(1, round(0.2 / max(times)))
    balancer.observe(
        StepWindow(
            steps,
            steps * max(times),
            [steps * time for time in times],
            [0.0] * len(times),
            [steps * (max(times) - time) for time in times],
            [steps * 1e-6 / v for v in speeds],
        )
    )
    return adopted(balancer)


def adopted(balancer: Balancer) -> Change | None:
    """Let a worker adopt its own proposal, as if it were rank 0."""
    proposal = balancer.proposal
    return balancer.adopt(proposal.after) if proposal else None


def counts(balancer: Balancer) -> list[int]:
    return [end - first for first, end in balancer.owned]


def test_ownership_follows_a_slow_worker_and_comes_back() -> None:
    balancer = Balancer(32, shares(32, 2))
    for _ in range(10):
        assert observed(balancer, [1, 1]) is None
    for _ in range(15):
        observed(balancer, [1, 0.5])
    assert makespan(balancer.owned, [1, 0.5]) <= 22 / (1 - DEADBAND)
    for _ in range(60):
        observed(balancer, [1, 1])
    assert counts(balancer) == [16, 16]


def test_a_worker_that_got_nothing_is_tried_again() -> None:
    balancer = Balancer(8, shares(8, 2))
    for _ in range(10):
        observed(balancer, [1, 0.01])
    assert counts(balancer) == [8, 0]
    for _ in range(150):
        observed(balancer, [1, 1])
    assert counts(balancer) == [4, 4]


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(2, 5))
def test_noise_within_the_deadband_moves_nothing(seed: int, workers: int) -> None:
    chance = random.Random(seed)
    balancer = Balancer(60, shares(60, workers))
    for _ in range(100):
        noisy = [1 + DEADBAND / 3 * (2 * chance.random() - 1) for _ in range(workers)]
        assert observed(balancer, noisy) is None


@settings(max_examples=30)
@given(st.integers(0, 2**32))
def test_all_workers_adopt_the_proposal_of_rank_0(seed: int) -> None:
    chance = random.Random(seed)
    first, other = (Balancer(16, shares(16, 3)) for _ in range(2))
    for _ in range(40):
        other.observe(
            StepWindow(1, 0.2, [chance.random() for _ in range(3)], *[[0] * 3] * 3)
        )
        change = observed(first, [chance.uniform(0.2, 1) for _ in range(3)])
        if change is not None:
            assert other.adopt(change.after).after == first.owned == other.owned
            assert other.proposal is None
    assert other.owned == first.owned


@given(
    st.booleans(),
    st.booleans(),
    st.integers(0, 1000),
    st.none() | st.integers(0, 4),
    st.just(()) | st.lists(st.integers(1, 9), min_size=5, max_size=5).map(tuple),
)
def test_a_decision_arrives_as_it_was_sent(
    stop: bool, save: bool, steps: int, leaving: int | None, owned: tuple[int, ...]
) -> None:
    sent = Decision(stop, save, steps, leaving, owned)
    cells = sent.to_cells(5)
    assert len(cells) == num_cells(5)
    assert Decision.from_cells(cells) == sent


RANK_1_ROUNDS_OTHERWISE = """
import os
from samestep.core import balancer, ownership

def build(inputs, outputs):
    # Proposes at once; ranks 0 and 1 propose otherwise, as with another libm.
    balancer.LEAST_SECONDS, balancer.URGENT, balancer.URGENT_CONFIRMATIONS = 0, -99, 1
    first = 1 if os.environ["RANK"] == "0" else 5
    ownership.fastest = lambda number, speeds, *_: ownership.contiguous(
        [first, number - first] if len(speeds) == 2 else [number]
    )
    return nn.Sequential(nn.Linear(inputs[0], 7), nn.ReLU(), nn.Linear(7, outputs))
"""


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_a_worker_that_would_decide_otherwise_changes_nothing(
    train: Train, own: Own, exchange: str
) -> None:
    recipe = own(RANK_1_ROUNDS_OTHERWISE, epochs=8)
    alone = train(recipe, 1)
    run = train(recipe, 2, exchange=exchange)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    events = [event["event"] for event in map(json.loads, lines)]
    assert "rebalanced" in events
    assert results(run) == results(alone)


def test_slow_samples_are_named_as_the_cause() -> None:
    balancer = Balancer(8, shares(8, 2))
    change = None
    while change is None:
        balancer.observe(
            StepWindow(10, 0.2, [0.1, 0.2], [0.01, 0.15], [0.1, 0], [0, 0])
        )
        change = adopted(balancer)
    assert change.cause == "data"
    assert counts(balancer) == [6, 2]  # as fast as 5 and 3, with fewer partials
    assert change.gain == pytest.approx(0.25)
    for speeds in (change.speeds_before, change.speeds):
        assert speeds == pytest.approx([400, 200])


def test_only_auto_rebalances_and_only_stragglers_are_dropped() -> None:
    fixed = Balancer(8, shares(8, 2), is_live=False)
    for _ in range(20):
        assert observed(fixed, [1, 0.1]) is None
    live = Balancer(8, shares(8, 2), drop_stragglers_below=0.2)
    for _ in range(20):
        observed(live, [1, 0.5])
        assert live.straggler_to_drop is None
    for _ in range(20):
        observed(live, [1, 0.05])
    assert live.straggler_to_drop == 1
    even = Balancer(8, shares(8, 2), is_live=False, drop_stragglers_below=0.2)
    for _ in range(20):
        observed(even, [1, 0.05])
    assert even.straggler_to_drop == 1


def test_a_step_of_the_others_alone() -> None:
    speeds, updates = [300.0, 100.0, 150.0], [0.001, 0.003, 0.002]
    seconds = ownership.seconds_without(1, 9, speeds, updates)
    assert seconds == pytest.approx(6 / 300 + 0.002 * 3 / 2)


@pytest.mark.parametrize("is_live", [True, False])
def test_a_worker_that_only_holds_the_others_up_is_named_once(is_live: bool) -> None:
    balancer = Balancer(30, shares(30, 3), is_live)
    for _ in range(40):
        observed(balancer, [1, 0.9, 0.8])
        assert balancer.straggler is None
    stragglers = []
    for _ in range(120):
        step = StepWindow(1, 0.2, [0.1, 0.1, 0.2], [0] * 3, [0.1, 0.1, 0], [0, 0, 0.1])
        balancer.observe(step)
        stragglers.append(balancer.straggler)
    (straggler,) = filter(None, stragglers)
    assert straggler.worker == 2
    assert 0.05 < straggler.gain < 1


def test_a_hopeless_worker_is_tried_more_and_more_rarely_and_named() -> None:
    balancer = Balancer(32, shares(32, 2))
    for _ in range(20):
        observed(balancer, [1, 1])
    stragglers, tries = [], []
    for number in range(2000):
        if observed(balancer, [1, 0.004]) and counts(balancer)[1]:
            tries.append(number)
        stragglers.append(balancer.straggler)
    gaps = [after - before for before, after in pairwise(tries)]
    assert gaps[2] > 3 * gaps[0]
    (straggler,) = filter(None, stragglers)
    assert straggler.worker == 1


def test_a_worker_at_half_speed_is_no_hindrance() -> None:
    balancer = Balancer(32, shares(32, 2))
    for speeds in ([1, 1], [1, 0.5], [1, 0.15], [0.5, 1]):
        for _ in range(100):
            observed(balancer, speeds)
            assert balancer.straggler is None


def test_a_late_worker_without_micro_batches_is_not_believed_to_be_fast() -> None:
    balancer = Balancer(8, shares(8, 2))
    for _ in range(10):
        observed(balancer, [1, 0.01])
    assert counts(balancer) == [8, 0]
    for _ in range(20):
        late = StepWindow(1, 0.2, [0.01, 0.0], [0, 0], [0.01, 0.0], [0.001, 0.19])
        balancer.observe(late)
        adopted(balancer)
    assert counts(balancer) == [8, 0]
    for _ in range(150):
        observed(balancer, [1, 1])
    assert counts(balancer) == [4, 4]


def test_the_summary_has_the_gain_and_what_would_help() -> None:
    balancer = Balancer(4, shares(4, 2))
    for _ in range(100):
        observed(balancer, [1, 0.5])
    summary = balancer.summary()
    assert counts(balancer) == [3, 1]
    assert summary["saved"] == pytest.approx(0.25, abs=0.03)
    assert summary["lag"]["1"]["speed"] == pytest.approx(0.5, abs=0.01)
    assert summary["efficiency"] == pytest.approx(4 / 1.5 / 3)
    assert summary["enough_micro_batches"] == 16


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_no_ownership_changes_the_result(
    train: Train, exchange: str, norm: str
) -> None:
    recipe = small_recipe(model__norm=norm, optimizer__max_grad_norm=0.5, epochs=2)
    alone = results(train(recipe, 1))
    for workers, owners in [
        (2, "random"),
        (3, "random"),
        (6, "random"),
        (2, (5, 1)),
        (3, (0, 6, 0)),
        (3, (1, 0, 5)),
        (2, "off"),
    ]:
        run = train(recipe, workers, exchange=exchange, balance=owners)
        assert results(run) == alone


def test_short_windows_are_joined() -> None:
    long, short = (Balancer(8, shares(8, 2)) for _ in range(2))
    whole = StepWindow(16, 0.16, [0.16, 0.08], [0, 0], [0, 0.08], [0, 0])
    part = StepWindow(1, 0.01, [0.01, 0.005], [0, 0], [0, 0.005], [0, 0])
    for _ in range(30):
        long.observe(whole)
        adopted(long)
        for _ in range(16):
            short.observe(part)
            adopted(short)
    assert long.owned == short.owned != shares(8, 2)
    assert long.speeds == pytest.approx(short.speeds)


LAGS = """
import os, time

def loss(outputs, targets):
    if outputs.requires_grad and os.environ["RANK"] == "1":
        time.sleep(0.01)
    return functional.cross_entropy(outputs, targets, reduction="none")
"""


def test_a_hopeless_worker_leaves_and_the_run_goes_on(own: Own, train: Train) -> None:
    recipe = own(LAGS, epochs=60)
    run = train(recipe, 2, drop_stragglers_below=0.9)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    events = [event["event"] for event in map(json.loads, lines)]
    assert [e for e in events if e in ("evicted", "restart")] == ["evicted", "restart"]
    assert run.weights_sha256 == train(recipe, 1).weights_sha256


def test_random_ownership_visits_all_and_none() -> None:
    seen = {share for step in range(300) for share in random_ownership(4, 3, step)}
    assert (0, 4) in seen
    assert (2, 2) in seen


def test_a_fixed_balance_must_fit() -> None:
    with pytest.raises(
        PlacementError, match=r"2 numbers that add up to 4; received `5,3`"
    ):
        Placement(workers=2, balance=(5, 3)).resolve(4)
    assert Placement(workers=2, balance=(1, 3)).resolve(4)[0].balance == (1, 3)
    for fewer in ({"drop_stragglers_below": 0.1}, {"min_workers": 1}):
        with pytest.raises(PlacementError, match=r"`1,3`, is for 2 workers"):
            Placement(workers=2, balance=(1, 3), **fewer).resolve(4)
