import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from samestep import Placement, PlacementError, Recipe
from samestep.system import machine


@pytest.fixture
def recipe() -> Recipe:
    return Recipe.load("mnist-mlp")


def test_cores_outside_the_affinity_mask_are_not_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert machine.usable_cores()[0] == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("version", [1, 2])
def test_a_cpu_quota_limits_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(machine, "_cgroup_directories", lambda _: [tmp_path])
    assert machine.cpu_quota() is None
    if version == 1:
        (tmp_path / "cpu.cfs_quota_us").write_text("150000\n")
        (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert machine.cpu_quota() == 1.5
    assert machine.usable_cores() == (1, "the CPU quota of 1.5 cores")


@pytest.mark.parametrize("text", ["max 100000\n", "-1\n"])
def test_an_unlimited_quota_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(machine, "_cgroup_directories", lambda _: [tmp_path])
    name = "cpu.max" if "max" in text else "cpu.cfs_quota_us"
    (tmp_path / name).write_text(text)
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.cpu_quota() is None


def test_auto_takes_all_cores_but_no_more_than_there_are_micro_batches(
    monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: (64, "a large machine"))
    placement, why = Placement().resolve(recipe.micro_batches)
    assert placement.workers == recipe.micro_batches
    assert why.startswith("4 workers (the recipe's micro-batches), exchange ")
    monkeypatch.setattr(machine, "usable_cores", lambda: (1, "a small machine"))
    assert (
        Placement()
        .resolve(recipe.micro_batches)[1]
        .startswith("1 worker (a small machine)")
    )


def test_more_workers_than_micro_batches_are_refused(recipe: Recipe) -> None:
    with pytest.raises(PlacementError, match="9 workers cannot share 4 micro-batches"):
        Placement(workers=9).resolve(recipe.micro_batches)


def test_the_description_is_complete() -> None:
    described = machine.describe()
    assert described["usable_cores"] >= 1
    assert described["memory_limit_bytes"] <= described["memory_bytes"]
    assert set(described["libraries"]) >= {"torch", "numpy", "samestep"}


MEGABYTE = 1 << 20
IN_CGROUP = """
import os, sys
from pathlib import Path
from samestep.errors import PlacementError
from samestep.system import machine, shared_memory

(Path(sys.argv[1]) / "cgroup.procs").write_text(str(os.getpid()))
used = b"x" * (150 << 20)
with open(sys.argv[2], "rb") as file:  # 100 MB of cache, which can be reclaimed
    while file.read(1 << 20):
        pass
print(machine.available_memory())
try:
    shared_memory.reserve(shared_memory.create(), 280 << 20, "This", "Use less.")
except PlacementError as error:
    print(error)
"""


@pytest.fixture
def limited() -> Iterator[Path]:
    """A memory cgroup, v1 or v2, of 400 MB."""
    base = machine.CGROUPS
    v1 = (base / "memory").is_dir()
    path = base / ("memory" if v1 else "") / f"samestep-test-{os.getpid()}"
    name = "memory.limit_in_bytes" if v1 else "memory.max"
    try:
        path.mkdir()
    except OSError:
        pytest.skip("a memory cgroup needs root and a cgroup file system")
    try:
        try:
            (path / name).write_text(str(400 * MEGABYTE))
        except OSError:
            pytest.skip("the memory controller is not given to this cgroup")
        yield path
    finally:
        path.rmdir()


def test_memory_that_the_cgroup_has_used_is_not_available(
    tmp_path: Path, limited: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(100 * MEGABYTE))
    arguments = [sys.executable, "-c", IN_CGROUP, str(limited), str(tmp_path / "file")]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    available, refused = ended.stdout.splitlines()
    assert 180 * MEGABYTE < int(available) < 250 * MEGABYTE
    assert "needs 294 MB of shared memory on this machine: Cannot allocate" in refused


@pytest.mark.parametrize("version", [1, 2])
def test_the_cache_of_files_counts_as_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    monkeypatch.setattr(machine, "_cgroup_directories", lambda _: [tmp_path])
    limit, used, *cache = machine.MEMORY_FILES[2 - version]
    (tmp_path / limit).write_text("4000\n")
    (tmp_path / used).write_text("3000\n")
    (tmp_path / "memory.stat").write_text(f"{cache[0]} 200\n{cache[1]} 500\nanon 9\n")
    assert machine.available_memory() == 1700
    (tmp_path / used).write_text("5000\n")
    assert machine.available_memory() == 0
