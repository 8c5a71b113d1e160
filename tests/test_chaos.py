"""`samestep chaos`: the plan is pure, and a small one runs here."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import marked, started_by

from samestep import PlacementError, Recipe
from samestep.chaos.plan import KILL_POINTS, KINDS, plan
from samestep.chaos.run import run_chaos


@given(
    st.integers(0, 2**32),
    st.integers(1, 30),
    st.lists(st.sampled_from(KINDS), min_size=1, unique=True),
    st.integers(20, 10_000),
    st.integers(1, 9),
)
def test_a_plan_depends_on_its_seed_alone(
    seed: int, kills: int, kinds: list[str], steps: int, workers: int
) -> None:
    injections = plan(seed, kills, kinds, steps, workers)
    assert injections == plan(seed, kills, kinds, steps, workers)
    main = "kill" if "kill" in kinds else kinds[0]
    assert sum(i.kind == main for i in injections) == kills
    assert {i.kind for i in injections} == set(kinds)
    assert [i.number for i in injections] == list(range(1, len(injections) + 1))
    assert all(1 <= i.step < steps and 0 <= i.rank < workers for i in injections)
    if any(i.point == "restart" for i in injections):
        assert injections[-1].point != "restart"


def test_ten_kills_visit_every_point() -> None:
    points = {i.point for i in plan(0, len(KILL_POINTS), ["kill"], 400, 2)}
    assert points == set(KILL_POINTS)


def test_an_unknown_fault_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"received `kil`\. Did you mean `kill`\?"):
        run_chaos(Recipe.load("mnist-mlp"), 1, 0, ["kil"], 1, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_chaos_changes_no_bit_and_leaves_nothing(tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "samestep", "chaos", "--kills", "8"),
            *("--set", "data.train_samples=20000"),
            *("--seed", "1", "--out", str(tmp_path / "chaos")),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=marked(tmp_path),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "faults injected, 0 processes left behind: identical" in ended.stdout
    assert "\x1b" not in ended.stdout
    fingerprints = {
        line.split()[-1] for line in ended.stdout.splitlines() if "sha256" in line
    }
    assert len(fingerprints) == 1
    assert list(started_by(tmp_path)) == []
