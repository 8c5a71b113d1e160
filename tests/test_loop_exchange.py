"""How the workers of a `samestep.Loop` sum, and notice what happens to each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_loop import DEADLINE, EVERYTHING, FORK, by_workers, network
from test_loop_weights import GAN, SCRIPT

import samestep
from samestep import PlacementError


def over(exchange: str, script: str) -> str:
    """Return the script with loops that sum in no other way.

    After each step the workers own other micro-batches.
    """
    ways = f'exchange="{exchange}", balance="random", micro_batches='
    return re.sub("micro_batches=", ways, script)


@pytest.mark.parametrize(
    ("script", "workers"),
    [(EVERYTHING, (2, 3, 5)), (SCRIPT, (2, 5)), (GAN, (2, 3))],
    ids=["everything", "weighed", "two loops"],
)
def test_both_exchanges_give_the_bits_of_one_worker(
    tmp_path: Path, script: str, workers: tuple[int, ...]
) -> None:
    shared = by_workers(over("shared", script), tmp_path, 1, *workers)
    gloo = by_workers(over("gloo", script), tmp_path, *workers)
    alone = gloo[: len(gloo) // len(workers)]
    assert gloo == len(workers) * alone
    assert shared == (1 + len(workers)) * alone


HEAD = """
import os, re, signal, sys, torch, samestep
from pathlib import Path
from samestep.system import peers
rank = int(os.environ["RANK"])
torch.manual_seed(0)
model = torch.nn.Linear(5, 3)

def train(loop, epoch):
    for step in loop.steps(torch.ones(8, 5), 8, epoch):
        for x in step:
            model(x).mean().backward()
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_who_waits_for_a_worker_that_has_ended_gets_an_error_that_names_it(
    tmp_path: Path, end: str
) -> None:
    """Long before the timeout of ten minutes."""
    script = f"""{HEAD}
loop = samestep.Loop(model, micro_batches=3, exchange="shared")
try:
    for epoch in range(9):
        if (rank, epoch) == (1, 4):
            {end}
        train(loop, epoch)
except samestep.PeerLost as error:
    os.write(1, f"{{epoch}} {{error}}\\n".encode())
"""
    (tmp_path / "script.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "-c", FORK, "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    error = "4 All workers take part in every exchange, to the end; worker 1 has ended"
    found = ended.stdout.splitlines()
    assert len(found) == 2, ended.stderr
    assert all(line.startswith(error) for line in found), found


def test_memory_has_no_name_and_is_freed_with_the_loop(tmp_path: Path) -> None:
    script = f"""{HEAD}
import gc
def mapped():
    return Path("/proc/self/maps").read_text().count("/memfd:samestep (deleted)")
loop = samestep.Loop(model, micro_batches=2, exchange="shared")
train(loop, 0)
assert mapped() == 1
loop.print(loop.fingerprint())
del loop
gc.collect()
assert mapped() == 0
"""
    assert len(by_workers(script, tmp_path, 2)) == 1


FALLBACK = """
if rank == 1:
    Path("boot_id").write_text("another")
    peers.BOOT_ID = Path("boot_id")
"""


def test_workers_that_cannot_share_memory_say_why_and_take_gloo(tmp_path: Path) -> None:
    script = f"""{HEAD}{FALLBACK}
loop = samestep.Loop(model, micro_batches=3)
train(loop, 0)
model.bias.requires_grad_(False)
train(loop, 1)
loop.print(loop.fingerprint())
"""
    (tmp_path / "script.py").write_text(script)
    ended = subprocess.run(
        [sys.executable, "-c", FORK, "1", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    alone, three = ended.stdout.splitlines()
    assert alone == three
    notice = (
        "exchange gloo, since no memory is shared; worker 1: the memory is that of "
        "another machine."
    )
    assert ended.stderr.count(notice) == ended.stderr.count("exchange gloo") == 1


def test_without_the_memory_that_was_asked_for_all_workers_raise(
    tmp_path: Path,
) -> None:
    script = f"""{HEAD}{FALLBACK}
try:
    samestep.Loop(model, micro_batches=3, exchange="shared")
except samestep.PlacementError as error:
    os.write(1, f"{{error}}\\n".encode())
"""
    (error,) = set(by_workers(script, tmp_path, 3))
    assert "worker 1: the memory is that of another machine" in error
    assert 'Use `exchange="gloo"`; the result is the same.' in error


def test_an_exchange_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PlacementError, match="received `nccl`"):
        samestep.Loop(network(), 2, exchange="nccl")  # type: ignore[arg-type]
