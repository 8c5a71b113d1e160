"""How machines find each other, what they say while they wait, and how one ends."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Train, small_recipe
from processes import is_running, reserved_port

from samestep.config.placement import Placement
from samestep.elastic import node_state
from samestep.elastic.nodes import _judge
from samestep.elastic.preflight import Request
from samestep.elastic.worker import _check
from samestep.errors import Interrupted, OutputError, PlacementError
from samestep.system.signals import Stop


DEADLINE = 120.0


def nodes(endpoint: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """One machine of two, whose end is awaited."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "samestep", "train", "--nodes", "2"),
            *("--rdzv-endpoint", endpoint, "--interface", "127.0.0.1"),
            *("--workers", "1", "--out", str(out / "run"), *more),
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        ("127.0.0.1:99999", "a port from 1 to 65535, such as h1:29400; received"),
        ("127.0.0.1", "An endpoint is HOST:PORT"),
        ("no-such-host.invalid:29400", "`no-such-host.invalid` cannot be resolved"),
    ],
)
def test_an_endpoint_that_cannot_be_one_is_refused_at_once(
    tmp_path: Path, endpoint: str, says: str
) -> None:
    ended = nodes(endpoint, tmp_path)
    assert ended.returncode == 2
    assert says in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert "torch.distributed.run" not in ended.stderr


def test_a_stop_before_anything_was_saved_is_an_error(tmp_path: Path) -> None:
    """Else a scheduler would requeue the job for ever."""
    run, stopped_worker = tmp_path / "run", ("A worker stopped", 75)
    asked = Stop(number=signal.SIGUSR1)
    for stop, failure in ((asked, ("", None)), (Stop(), stopped_worker)):
        with pytest.raises(OutputError, match="Nothing was saved"):
            _judge(1, stop, failure, run, in_etcd=False)
    about = run / node_state.DIRECTORY / "h1" / "1" / node_state.ABOUT
    about.parent.mkdir(parents=True)
    about.touch()
    for stop, failure in ((asked, ("", None)), (Stop(), stopped_worker)):
        with pytest.raises(Interrupted, match="go on with") as caught:
            _judge(1, stop, failure, run, in_etcd=False)
        assert caught.value.exit_code == 75


def test_etcd_must_answer_and_the_job_have_a_name_of_its_own(tmp_path: Path) -> None:
    with reserved_port() as port:
        endpoint, etcd = f"127.0.0.1:{port}", ("--rdzv-backend", "etcd-v2")
        unnamed = nodes(endpoint, tmp_path, *etcd)
        silent = nodes(endpoint, tmp_path, *etcd, "--rdzv-id", "mine")
    for ended in (unnamed, silent):
        assert ended.returncode == 2, ended.stderr
        assert "Traceback" not in ended.stderr
    assert "give this one a name of its own" in unnamed.stderr
    assert f"{endpoint} does not answer as etcd" in " ".join(silent.stderr.split())


def test_an_endpoint_where_another_program_answers_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = nodes(f"127.0.0.1:{port}", tmp_path)
    assert ended.returncode == 2, ended.stderr
    said = " ".join(ended.stderr.split())
    assert f"another program answers at 127.0.0.1:{port}" in said
    assert "Traceback" not in ended.stderr


def torchrun(endpoint: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
        *("--rdzv-backend", "samestep", "--rdzv-endpoint", endpoint),
        *("--rdzv-id", "x", "--local-addr", "127.0.0.1", *more),
        *("-m", "samestep.worker", "train", "--interface", "127.0.0.1"),
    ]


@pytest.mark.parametrize("is_endpoint_here", [True, False])
def test_a_machine_says_for_whom_it_waits_and_gives_up_in_one_sentence(
    is_endpoint_here: bool,
) -> None:
    with reserved_port() as port:
        # No machine has an address of 192.0.2.0/24: RFC 5737 keeps it for documents.
        endpoint = f"{'127.0.0.1' if is_endpoint_here else '192.0.2.1'}:{port}"
        ended = subprocess.run(
            torchrun(endpoint, "--rdzv-conf", "join_timeout=6"),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    where = f"machines, job x, at {endpoint}"
    if is_endpoint_here:
        assert f"waiting for 1 of 2 {where}\n" in ended.stderr
        assert "Fewer than 2 machines have arrived in time" in ended.stderr
    else:
        assert "The machine of the endpoint must answer within 6 s" in ended.stderr


@pytest.mark.parametrize(
    "option",
    [
        {"profile": 3},
        {"drop_stragglers_below": 0.5},
        {"min_workers": 1},
    ],
)
def test_what_needs_a_supervisor_is_refused_under_torchrun(
    option: dict[str, Any],
) -> None:
    placement = Placement.model_validate({"workers": "auto", **option})
    with pytest.raises(PlacementError, match="does not run under torchrun"):
        _check(Request(Path("run"), None, {}, placement, None))


ORPHAN = """
import os, subprocess, sys, time
child = '''
import sys, time
from samestep.elastic.watchdog import Watcher
hang = lambda: time.sleep(600)  # as a last write to a disk that hangs
watcher = Watcher(save=hang, ending_seconds=0.2)
watcher.start()
if sys.argv[1] == "main":
    watcher.ending.acquire()
print("ready", flush=True)
hang()
'''
command = [sys.executable, "-c", child, sys.argv[1]]
process = subprocess.Popen(command, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
"""


@pytest.mark.parametrize("thread", ["main", "watcher"])
def test_an_orphan_whose_last_write_hangs_ends(thread: str) -> None:
    orphaned = subprocess.run(
        [sys.executable, "-c", ORPHAN, thread],
        stdout=subprocess.PIPE,
        timeout=DEADLINE,
        check=True,
    )
    pid, end = int(orphaned.stdout), time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("damage", ['{"type": "epo\n', "[" * 100_000 + "\n", "7\n"])
def test_a_damaged_record_keeps_no_machine_out(train: Train, damage: str) -> None:
    run = train(small_recipe(epochs=2)).path
    whole = node_state.newest(run)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([lines[0], damage, *lines[1:]]))
    found = node_state.newest(run)
    assert whole is not None
    assert found is not None
    assert (found.state.step, found.epochs) == (whole.state.step, whole.epochs)
    assert found.metrics == lines[0]
