"""A thousand damaged and malicious inputs, a different thousand each time."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_readers import READERS
from fuzzing import playing
from test_launch import DEADLINE


INPUTS = 1_000
HERE = Path(__file__).parent


def test_no_reader_is_led_astray_by_a_thousand_inputs() -> None:
    seed = str(secrets.randbelow(1 << 40))
    ended = subprocess.run(
        [sys.executable, "fuzzing.py", str(INPUTS), "--seed", seed],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(["../src", "."])},
        timeout=4 * DEADLINE,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()] == list(READERS)


@pytest.mark.parametrize("name", ["compare", "recipe", "npz"])
def test_the_same_seed_is_the_same_input(tmp_path: Path, name: str) -> None:
    """Or a finding could not be looked at."""
    ends = []
    for number in range(2):
        with playing(tmp_path / str(number), name) as playground:
            ends.append([playground.try_mutated(seed) for seed in range(30)])
    assert ends[0] == ends[1]
    assert len(set(ends[0])) > 1
