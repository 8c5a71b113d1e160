"""Whoever was cut off and comes back cannot write into a run."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import small_recipe
from test_checkpoint import LAYOUT, state_of
from test_checkpoint_writer import checkpoints_of

from samestep import Placement
from samestep.elastic.preflight import _check_directory
from samestep.errors import OutputError, RunError
from samestep.messages.training import Stopped
from samestep.output.fence import Fence, number_in, writer_of
from samestep.output.run import Settings
from samestep.output.run_writer import RunWriter
from samestep.state import checkpoint


def writer_in(path: Path, number: int) -> RunWriter:
    path.mkdir(exist_ok=True)
    where = Settings.of(small_recipe(), Placement(workers=1)), 0.0
    with RunWriter.reopen(path, *where, generation=(number, "a test")) as writer:
        return writer  # unlocked: as on a file system whose locks do not hold


def test_an_old_generation_cannot_write(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = writer_in(run, 3)
    old.event("while it is the newest")
    writer_in(run, 4).event("while it is the newest, too")
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for write in (
        lambda: old.event("later"),
        lambda: old.receive(Stopped(step=7)),
        lambda: old.write_model(b"weights"),
        lambda: old.close("finished"),
    ):
        with pytest.raises(OutputError, match="by now that is 4, and this is 3"):
            write()
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    with pytest.raises(OutputError):
        writer_in(run, 3)


def test_an_old_generation_writes_no_checkpoint(tmp_path: Path) -> None:
    events: list[Any] = []
    with checkpoints_of(tmp_path, events.append) as checkpoints:
        assert checkpoints.write(state_of(1), LAYOUT, [])
        Fence.claim(tmp_path, 2)
        assert not checkpoints.write(state_of(2), LAYOUT, [])
    assert checkpoint.steps(checkpoint.directory_of(tmp_path)) == [1]


def test_each_command_on_a_run_has_the_next_number(tmp_path: Path) -> None:
    assert number_in(tmp_path) == 0
    assert [Fence.claim(tmp_path).number for _ in range(3)] == [1, 2, 3]
    assert Fence.claim(tmp_path, 9, "somebody").holds
    assert (number_in(tmp_path), writer_of(tmp_path)) == (9, "somebody")


def test_of_two_that_claim_one_number_only_the_first_writes(tmp_path: Path) -> None:
    first = Fence.claim(tmp_path, 4, "first")
    with pytest.raises(OutputError, match="another process already has number 4"):
        Fence.claim(tmp_path, 4, "second")
    assert (number_in(tmp_path), writer_of(tmp_path)) == (4, "first")
    assert first.holds


def test_machines_go_on_with_a_run_that_was_only_opened(tmp_path: Path) -> None:
    writer_in(tmp_path / "run", 3)
    _check_directory(tmp_path / "run", small_recipe(), is_resumed=False)
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(RunError, match="never overwrites"):
        _check_directory(tmp_path / "run", small_recipe(), is_resumed=False)


CLAIM = """
import sys
from pathlib import Path
from samestep.errors import OutputError
from samestep.output.fence import Fence

print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    try:
        print(Fence.claim(Path(sys.argv[1])).number)
    except OutputError:  # another process has a higher number already
        pass
"""


def test_claims_at_the_same_time_have_different_numbers(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    numbers = [int(number) for each in said for number in each]
    assert len(numbers) == len(set(numbers)) >= 20
    assert number_in(tmp_path) == max(numbers)
