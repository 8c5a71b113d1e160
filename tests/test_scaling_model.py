"""The analysis of `samestep scale`: fits, predictions, advice."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaling_samples import GRADIENT_BYTES, TRUE, imagined_study, true_model

from samestep.scaling.analysis import analyse, hold_out
from samestep.scaling.fit import fit, nonnegative, observations
from samestep.scaling.intervals import interval, summarise
from samestep.scaling.predict import (
    best_per_node,
    even_micro_batches,
    machine_counts,
    relative_samples,
)
from samestep.scaling.step_model import (
    Model,
    Network,
    expected_maximum,
    overlapped,
    work,
)


# Statistics


def test_an_interval_holds_the_median_and_shrinks_with_more_rounds() -> None:
    values = np.random.default_rng(1).normal(10, 1, 400).tolist()
    few, many = interval(values[:5]), interval(values)
    assert few[1] <= few[0] <= few[2]
    assert many[2] - many[1] < few[2] - few[1]
    assert interval([3.0]) == (3.0, 3.0, 3.0)


def test_speed_ups_are_paired_within_rounds() -> None:
    """A machine that halves its speed in some rounds shows the same speed-up."""
    study = imagined_study(true_model(kappa=0.0), weak=True)
    for runs in study.runs.values():
        for run in runs[::2]:
            run.samples_per_second /= 2
    points = {(p.kind, p.workers): p for p in summarise(study.runs, "shared")}
    four, weak = points["strong", 4], points["weak", 4]
    assert four.speedup_low == pytest.approx(four.speedup_high)
    assert four.limit_speedup == pytest.approx(4.0)
    assert four.efficiency == pytest.approx((four.speedup or 0.0) / 4)
    assert (weak.speedup or 0.0) > (four.speedup or 0.0)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 0.0), (2, 0.5642), (3, 0.8463), (8, 1.4236)]
)
def test_the_expected_maximum_of_normal_numbers(count: int, expected: float) -> None:
    assert expected_maximum(count) == pytest.approx(expected, abs=1e-4)


# The work of a step


@given(st.integers(1, 40), st.integers(1, 64))
def test_the_work_of_all_workers_is_the_work_of_one(workers: int, spare: int) -> None:
    micro_batches = workers + spare
    done = work(workers, 10 * micro_batches, micro_batches)
    assert sum(done.micro_batches) == micro_batches
    assert sum(done.samples) == pytest.approx(10 * micro_batches)
    assert sum(done.merges) + done.partials == micro_batches
    assert done.rows <= done.partials


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 64))
def test_the_work_of_nodes_is_that_of_all_their_workers(
    nodes: int, per_node: int, spare: int
) -> None:
    micro_batches = nodes * per_node + spare
    done = work(per_node, 10 * micro_batches, micro_batches, nodes)
    flat = work(nodes * per_node, 10 * micro_batches, micro_batches)
    assert (done.micro_batches, done.merges) == (flat.micro_batches, flat.merges)
    assert 1 <= done.node_rows <= done.partials <= flat.partials


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_aligned_nodes_send_what_a_ring_all_reduce_sends(
    nodes: int, per_node: int
) -> None:
    model = Model({**TRUE, "tau": 0.0, "rho": 0.0}, "shared", 8, GRADIENT_BYTES)
    done = work(per_node, 320, 32, nodes)
    ring = 2 * (nodes - 1) / nodes * GRADIENT_BYTES
    assert model.network_seconds(done, Network(1.0, 0.0)) == pytest.approx(ring)
    latency = 2.0 if nodes > 1 else 0.0
    assert model.network_seconds(done, Network(math.inf, 1.0)) == latency


def test_unaligned_nodes_send_each_of_their_partial_sums() -> None:
    model = Model({**TRUE, "tau": 0.0, "rho": 0.0}, "shared", 8, GRADIENT_BYTES)
    done = work(1, 320, 32, 3)  # the second: 10 to 12, to 16, to 20, and 20
    assert done.node_rows == 4
    sent = (4 + 1) * 2 / 3 * GRADIENT_BYTES
    assert model.network_seconds(done, Network(1.0, 0.0)) == pytest.approx(sent)


# Fitting and predicting


def test_known_parameters_are_found_again() -> None:
    study = imagined_study(true_model(), global_batches=(240, 960))
    model = fit(observations(study.runs), "shared", 8, GRADIENT_BYTES)
    used = {name: value for name, value in TRUE.items() if name not in ("tau", "q")}
    for name, value in used.items():
        assert model.parameters[name] == pytest.approx(value, rel=0.05), name


def test_gloo_without_overlap_is_found_again() -> None:
    study = imagined_study(true_model("gloo"), global_batches=(240, 960))
    seen = observations(study.runs)
    model = fit(seen, "gloo", 8, GRADIENT_BYTES)
    for o in seen:
        if o.point.kind == "strong":
            step = model.step(o.work)
            assert step == pytest.approx(o.step, rel=0.02)


def test_unseen_worker_counts_are_predicted_under_noise() -> None:
    truth = true_model()
    study = imagined_study(truth, noise=0.02, rounds=10)
    model = fit(observations(study.runs), "shared", 8, GRADIENT_BYTES)
    for workers in (6, 8):
        expected = truth.step(work(workers, 240, 24))
        assert model.step(work(workers, 240, 24)) == pytest.approx(expected, rel=0.05)


def test_the_largest_worker_count_is_held_out() -> None:
    study = imagined_study(true_model())
    held_out = hold_out(observations(study.runs), "shared", 8, GRADIENT_BYTES)
    assert held_out is not None
    assert held_out.workers == 4
    assert held_out.error == pytest.approx(0.0, abs=0.01)
    two = imagined_study(true_model(), workers=(1, 2))
    assert hold_out(observations(two.runs), "shared", 8, GRADIENT_BYTES) is None


@given(
    st.lists(st.floats(0, 5), min_size=3, max_size=3),
    st.integers(0, 1_000),
)
def test_non_negative_unknowns_are_found(true: list[float], seed: int) -> None:
    terms = np.random.default_rng(seed).uniform(0.1, 1, (12, 3))
    solution, _ = nonnegative(terms, terms @ np.array(true), np.ones(12))
    assert (solution >= 0).all()
    assert solution == pytest.approx(true, abs=0.01)


factors = st.floats(0.1, 10)
models = st.fixed_dictionaries(dict.fromkeys(TRUE, factors)).map(
    lambda drawn: {name: drawn[name] * TRUE[name] for name in TRUE} | {"q": 1.0}
)


@given(models, st.integers(1, 8), st.integers(1, 8))
def test_a_larger_batch_takes_longer_and_a_faster_network_less(
    parameters: dict[str, float], nodes: int, per_node: int
) -> None:
    model = Model(parameters, "shared", 8, GRADIENT_BYTES)
    slow, fast = Network(1e8, 1e-4), Network(1e9, 1e-5)
    micro = even_micro_batches(24, nodes * per_node)
    times = [
        model.step(work(per_node, batch, micro, nodes), network)
        for batch, network in ((2048, fast), (2048, slow), (4096, slow))
    ]
    assert times == sorted(times)
    assert model.step(work(per_node, 2048, 24)) <= model.step(work(per_node, 4096, 24))


@given(models)
def test_divided_work_shrinks_with_more_workers(
    parameters: dict[str, float],
) -> None:
    model = Model(parameters, "shared", 8, GRADIENT_BYTES)
    terms = [model.terms(work(workers, 2400, 24)) for workers in (1, 2, 4, 8)]
    free = Model({**parameters, "kappa": 0.0}, "shared", 8, GRADIENT_BYTES)
    computed = [
        free.terms(work(workers, 2400, 24))["compute"] for workers in (1, 2, 4, 8)
    ]
    assert computed == sorted(computed, reverse=True)
    optimizer = [term["optimizer"] for term in terms]
    assert optimizer == sorted(optimizer, reverse=True)


@given(models, st.integers(3, 24))
def test_more_workers_than_cores_take_turns(
    parameters: dict[str, float], workers: int
) -> None:
    model = Model(parameters, "shared", 2, GRADIENT_BYTES)
    assert model.step(work(workers, 2400, 24)) >= 0.999 * max(
        model.step(work(2, 2400, 24))
        - model.terms(work(2, 2400, 24))["straggle"]
        - model.terms(work(2, 2400, 24))["exchange"],
        0.0,
    )


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.floats(1, 10))
def test_overlap_hides_at_most_what_there_is(
    hidden: float, network: float, q: float
) -> None:
    exposed = overlapped(hidden, network, q)
    assert max(0.0, network - hidden) <= exposed + 1e-9
    assert exposed <= network + 1e-9


def test_predictions_cover_this_machine_and_one_beyond_its_cores() -> None:
    assert machine_counts([1, 2], cores=2, most=8) == [1, 2, 3, 4]
    assert machine_counts([1], cores=1, most=8) == [1, 2]
    assert machine_counts([1, 2], cores=6, most=24) == [1, 2, 3, 4, 5, 6, 7]
    assert machine_counts([1, 2], cores=2, most=2) == [1, 2]


def test_nodes_are_as_full_as_is_fastest() -> None:
    assert best_per_node({1: 100.0, 2: 180.0, 4: 200.0}, cores=2) == 2
    assert best_per_node({1: 100.0, 2: 80.0}, cores=2) == 1


def test_samples_to_the_same_loss_grow_beyond_the_critical_batch() -> None:
    assert relative_samples(64, 64, 1000.0) == 1
    assert relative_samples(1000, 0, 1000.0) == 2
    assert relative_samples(32, 64, 1000.0) < 1


# Everything together


def test_an_analysis_says_everything_in_numbers_and_words() -> None:
    network = {"bandwidth_bytes_per_second": 1.25e9, "latency_seconds": 5e-5}
    asked: dict[str, Any] = {"weak": True, "nodes_up_to": 16, **network}
    study = imagined_study(true_model(), noise=0.01, **asked)
    for point, runs in study.runs.items():
        for run in runs:
            run.noise_scale = 500.0 if point.kind == "strong" else None
    analysis = analyse(study, cores=8)
    content = analysis.model_dump()
    json.dumps(content, allow_nan=False)
    assert content["no_fit_because"] is None
    assert content["model"]["max_error"] < 0.05
    assert content["noise"]["critical_batch"] == 500.0
    predictions = content["predictions"]
    for line in predictions:
        assert line["low"] <= line["samples_per_second"] <= line["high"]
        assert line["relative_time_to_loss"] > 0
    nodes = [line for line in predictions if line["where"] == "nodes"]
    assert [line["nodes"] for line in nodes] == list(range(1, 17))
    (here,) = (p for p in predictions if (p["where"], p["workers"]) == ("machine", 4))
    expected = pytest.approx(here["samples_per_second"], rel=0.01)
    assert nodes[0]["samples_per_second"] == expected
    text = " ".join(analysis.advice)
    assert "4 workers: " in text
    assert "A fifth would gain " in text
    assert "Predicted over this network" in text
    assert "predicted from fewer" in text


def test_one_worker_count_gives_no_model_but_a_reason() -> None:
    analysis = analyse(imagined_study(true_model(), workers=(1,)), cores=2)
    assert analysis.model is None
    assert analysis.predictions == []
    reason = "at least one more worker count; measured: 1"
    assert reason in (analysis.no_fit_because or "")
    assert any("No model was fitted" in sentence for sentence in analysis.advice)


def test_two_worker_counts_say_what_they_cannot_tell() -> None:
    analysis = analyse(imagined_study(true_model(cores=2), workers=(1, 2)), cores=2)
    text = " ".join(analysis.advice)
    assert analysis.held_out is None
    assert "Nothing could be held out" in text
    assert "cannot be separated" in text
    assert "this machine has 2 cores" in text
