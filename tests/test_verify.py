"""`--verify`: a worker whose gradients are wrong is found, and changes no bit."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Own, Train, fault, small_recipe
from hypothesis import given
from hypothesis import strategies as st
from machines import machines
from test_exactness import results
from test_ledger import content
from test_recovery import events

import samestep
from samestep.core.plan import derive_seed
from samestep.errors import NotReproducible, WorkerWrong
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.fault_injection import Fault
from samestep.verification.second_worker import distances, wrong_worker


TORCH = small_recipe(
    model__norm="batch", optimizer__max_grad_norm=1.0, compression="bf16"
)
PORTABLE = small_recipe(arithmetic="portable")


@pytest.mark.parametrize(
    ("recipe", "workers", "exchange"),
    [
        (TORCH, 3, "shared"),
        (TORCH, 2, "gloo"),
        (PORTABLE, 2, "shared"),
        (PORTABLE, 3, "gloo"),
    ],
)
def test_a_training_has_the_same_bits_if_every_step_is_verified(
    train: Train, recipe: samestep.Recipe, workers: int, exchange: str
) -> None:
    run = train(recipe, workers, exchange=exchange, verify=1.0)
    alone = train(recipe, 1)
    assert results(run) == results(alone)
    assert content(run) == content(alone)
    assert run.result["restarts"] == 0
    assert run.result["wrong_workers"] == []


@pytest.mark.parametrize(
    ("recipe", "workers", "exchange"),
    [
        (TORCH, 3, "shared"),
        (TORCH, 2, "gloo"),
        (PORTABLE, 2, "shared"),
        (PORTABLE, 1, "shared"),
    ],
)
def test_a_worker_with_a_wrong_bit_is_named_and_changes_nothing(
    train: Train,
    train_under: Train,
    recipe: samestep.Recipe,
    workers: int,
    exchange: str,
) -> None:
    wrong = workers - 1
    flips = [fault("flip", "exchange", 4, wrong, number=n) for n in (1, 2)]
    run = train_under(recipe, flips, workers, exchange=exchange, verify=1.0)
    assert results(run) == results(train(recipe, 1))
    assert run.result["wrong_workers"] == [{"step": 5, "worker": wrong}] * 2
    assert run.result["restarts"] == 2
    failed, _ = events(run, "failed")
    assert f"worker {wrong} was wrong" in failed["error"]
    assert [event["worker"] for event in events(run, "wrong worker")] == [wrong] * 2


def test_wrong_bits_are_found_in_the_share_of_steps_that_is_drawn(
    train: Train, train_under: Train
) -> None:
    flips = [fault("flip", "exchange", n, 1, number=n) for n in range(11)]
    run = train_under(PORTABLE, flips, 2, verify=0.3)
    draws = [derive_seed(PORTABLE.seed, "verify", n) / 2**63 for n in range(11)]
    drawn = [n + 1 for n, draw in enumerate(draws) if draw < 0.3]
    assert 0 < len(drawn) < 11
    assert [each["step"] for each in run.result["wrong_workers"]] == drawn
    # The others were taken for right ones.
    assert run.weights_sha256 != train(PORTABLE, 1).weights_sha256


WRONG_IN_RANK_1 = """
import os

class Wrong(nn.Module):
    def forward(self, x):
        return x * (1.1 if os.environ["RANK"] == "1" else 1.0)

def build(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs[0], 7), Wrong(), nn.Linear(7, outputs))
"""


def test_of_three_workers_the_majority_is_right(own: Own, train: Train) -> None:
    recipe = own(WRONG_IN_RANK_1, arithmetic="torch")
    with pytest.raises(WorkerWrong, match="worker 1 was wrong") as error:
        train(recipe, 3, verify=1.0, probe=False, max_restarts=0)
    assert error.value.details["rank"] == 1


def test_two_workers_that_both_insist_are_both_named(own: Own, train: Train) -> None:
    recipe = own(WRONG_IN_RANK_1, arithmetic="torch")
    with pytest.raises(NotReproducible, match=r"worker \d and worker \d differ in mi"):
        train(recipe, 2, verify=1.0, probe=False)


@pytest.mark.parametrize(
    ("first", "again", "wrong"),
    [
        ([5, 6], [5, 5], 1),
        ([6, 5], [5, 5], 0),
        ([5, 6], [5, 7], 1),
        ([5, 6], [5, 6], None),
        ([5, 6], [7, 8], None),
        ([5, 6], [7, 7], None),
        ([5, 6], [5, 6, 6], 0),
        ([5, 6], [6, 6, 6], 0),
        ([5, 6], [5, 7, 8], 1),
        ([5, 6], [7, 7, 7], None),
        ([5, 6], [5, 7, 7, 5], 1),
    ],
)
def test_the_majority_or_else_constancy_is_right(
    first: Sequence[int], again: Sequence[int], wrong: int | None
) -> None:
    assert wrong_worker([*enumerate(first)], again) == wrong


def test_a_worker_that_is_alone_is_the_wrong_one() -> None:
    assert wrong_worker([(0, 5), (0, 6)], [5]) == 0


TWO_BY_TWO = ["h1", "h1", "h2", "h2"]


@pytest.mark.parametrize(
    ("recipe", "exchange"), [(TORCH, "shared"), (PORTABLE, "gloo")]
)
def test_machines_verify_every_step_without_a_false_alarm(
    train: Train,
    server: ForkServer,
    tmp_path: Path,
    recipe: samestep.Recipe,
    exchange: Literal["shared", "gloo"],
) -> None:
    how: dict[str, Any] = {"verify": 1.0, "hosts": TWO_BY_TWO}
    with machines(server, tmp_path, recipe, [2, 2], exchange, **how) as played:
        played.listen()
    assert [results(run) for run in played.runs()] == [results(train(recipe))] * 2


@pytest.mark.parametrize("recipe", [TORCH, PORTABLE])
def test_all_machines_name_the_wrong_worker_and_its_machine(
    server: ForkServer, tmp_path: Path, recipe: samestep.Recipe
) -> None:
    flip = Fault(number=1, kind="flip", point="exchange", step=4, rank=3)
    how: dict[str, Any] = {"verify": 1.0, "hosts": TWO_BY_TWO, "faults": [flip]}
    with machines(server, tmp_path, recipe, [2, 2], **how) as played:
        played.listen()
    failures = [played.failure(rank) for rank in range(4)]
    assert [each.error for each in failures] == ["PeerLost"] * 3 + ["WorkerWrong"]
    for each in failures:
        assert "of step 5 they differed, and worker 3 on h2 was wrong" in each.message


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_worker_is_checked_by_another_machine_wherever_one_has_room(
    sizes: list[int],
) -> None:
    hosts = [f"h{n}" for n, size in enumerate(sizes) for _ in range(size)]
    workers, largest = len(hosts), max(sizes)
    for distance in distances(hosts) if workers > 1 else []:
        checked = [(rank + distance) % workers for rank in range(workers)]
        assert sorted(checked) == list(range(workers))
        assert all(checked[rank] != rank for rank in range(workers))
        pairs = Counter(hosts[r] == hosts[c] for r, c in enumerate(checked))
        assert pairs[True] == max(0, 2 * largest - workers)


def test_on_one_machine_all_others_check_a_worker_in_turn() -> None:
    assert distances(["h1"] * 4) == range(1, 4)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_between_nothing_and_everything(share: Any) -> None:
    with pytest.raises(ValueError, match="verify"):
        samestep.Placement(verify=share)
