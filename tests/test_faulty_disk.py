"""A disk that is full or read-only for a while: real ones, in a mount namespace."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from agents import SLOW, hurry
from conftest import Own, Train
from test_launch import DEADLINE, long_training, trains, wait_until

from samestep import Run
from samestep.output.fence import Fence
from samestep.output.json_lines import JsonLines
from samestep.state import checkpoint
from samestep.system import fault_injection


NAMESPACE = ["unshare", "--mount", "--propagation", "private"]
EPOCHS = 40


def can_mount() -> bool:
    mount = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(mount, check=False, capture_output=True).returncode == 0


@contextmanager
def training_on(
    disk: Path, copy: Path, recipe: Path
) -> Iterator[subprocess.Popen[str]]:
    """Yield a training on its own disk of 3 MB; its run is copied when it ends."""
    disk.mkdir()
    command = [sys.executable, "-m", "samestep", "train", str(recipe)]
    train = [*command, "--out", f"{disk}/run", "--workers", "2"]
    script = (
        f'mount -t tmpfs -o size=3m tmpfs {disk} && "$@" --checkpoint-seconds 0.01; '
        f"code=$?; cp -r {disk}/run {copy}; exit $code"
    )
    with subprocess.Popen(
        [*NAMESPACE, "sh", "-c", script, "sh", *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def break_disk(how: str, process: subprocess.Popen[str], disk: Path) -> None:
    seen = Path(f"/proc/{process.pid}/root{disk}")
    if how == "full":
        fill(seen)
    else:
        run_inside(process, f"mount --bind {disk} {disk}")
        run_inside(process, f"mount -o remount,bind,ro {disk}")


def fill(disk: Path) -> None:
    """Take all of the space that is left."""
    status = os.statvfs(disk)
    with suppress(OSError), (disk / "filler").open("ab") as filler:
        filler.write(bytes(status.f_bavail * status.f_frsize))


def mend_disk(how: str, process: subprocess.Popen[str], disk: Path) -> None:
    if how == "full":
        Path(f"/proc/{process.pid}/root{disk}/filler").unlink()
    else:
        # Not unmounted: that fails while a file on it is open.
        run_inside(process, f"mount -o remount,bind,rw {disk}")


def run_inside(process: subprocess.Popen[str], script: str) -> None:
    enter = ["nsenter", "--target", str(process.pid), "--mount", "sh", "-c", script]
    subprocess.run(enter, check=True, timeout=DEADLINE)


@pytest.mark.skipif(not can_mount(), reason="mounting needs `unshare` and root")
@pytest.mark.parametrize(
    ("how", "reason"),
    [("full", "No space left on device"), ("read-only", "Read-only file system")],
)
def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, own: Own, train: Train, how: str, reason: str
) -> None:
    disk, copy, file = (tmp_path / name for name in ("disk", "copy", "recipe.toml"))
    recipe = own(SLOW.format(hurry=tmp_path / "hurry", seconds=0.1), epochs=EPOCHS)
    file.write_text(recipe.to_toml())
    with training_on(disk, copy, file) as process:
        run = Path(f"/proc/{process.pid}/root{disk}/run")
        wait_until(lambda: trains(run) or process.poll() is not None)
        wait_until(lambda: checkpoint.steps(checkpoint.directory_of(run)) != [])
        break_disk(how, process, disk)
        assert process.stderr is not None
        shown = ""
        while "the checkpoint of step" not in shown or "metrics.jsonl" not in shown:
            if how == "full":  # a checkpoint that was removed has made space
                fill(Path(f"/proc/{process.pid}/root{disk}"))
            line = process.stderr.readline()
            assert line, shown
            shown += line
        assert checkpoint.steps(checkpoint.directory_of(run))  # the one before stays
        mend_disk(how, process, disk)
        hurry()
        shown += process.communicate(timeout=DEADLINE)[1]
        assert process.returncode == 0, shown
    assert f"cannot be written: {reason}. The training goes on" in shown
    assert "metrics.jsonl can be written again; nothing was lost" in shown
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["type"] == "step"]
    assert steps == list(range(1, 3 * EPOCHS + 1))
    assert checkpoint.steps(checkpoint.directory_of(copy))[-1] == 3 * EPOCHS
    assert Run.open(copy).weights_sha256 == train(recipe).weights_sha256


def test_lines_wait_for_a_full_disk_and_none_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    lines = JsonLines(tmp_path / "lines.jsonl", Fence(tmp_path, 1), warnings.append)
    flag = tmp_path / "full"
    monkeypatch.setenv(fault_injection.DISK_FULL, str(flag))
    for number in range(9):
        if number == 3:
            flag.touch()
        if number == 6:
            flag.unlink()
        lines.append({"number": number})
        written = (tmp_path / "lines.jsonl").read_text().splitlines()
        assert len(written) == (3 if 3 <= number < 6 else number + 1)
    assert [json.loads(line)["number"] for line in written] == list(range(9))
    assert len(warnings) == 2


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on its own disk, of so many kilobytes."""
    disk = tmp_path / "small"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    mount = ["mount", *options]
    if (
        os.geteuid()
        or subprocess.run(mount, check=False, capture_output=True).returncode
    ):
        pytest.skip("a small disk needs `mount` and root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("small_disk", [120], indirect=True)
def test_a_stop_that_could_save_nothing_is_a_failure_and_says_why(
    small_disk: Path,
) -> None:
    run = small_disk / "run"
    with long_training(run, "--workers", "1") as (process, _):
        process.send_signal(signal.SIGUSR1)
        _, shown = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1, shown
    assert not checkpoint.steps(checkpoint.directory_of(run))
    assert "is not on disk (No space left on device). Nothing was saved" in shown
    assert "samestep resume" not in shown


@pytest.mark.parametrize("small_disk", [3000], indirect=True)
def test_a_stop_names_the_checkpoint_that_is_on_disk(small_disk: Path) -> None:
    run = small_disk / "run"
    directory = checkpoint.directory_of(run)
    arguments = ("--workers", "1", "--checkpoint-seconds", "0.01")
    with long_training(run, *arguments) as (process, _):
        wait_until(lambda: checkpoint.steps(directory) != [])
        status = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize))
        assert process.stderr is not None
        while "the checkpoint of step" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        _, shown = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, shown
    (step,) = re.findall(rf"go on with `samestep resume {run}`, from step (\d+)", shown)
    assert int(step) == checkpoint.steps(directory)[-1]
