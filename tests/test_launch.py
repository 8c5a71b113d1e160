"""Processes: how they start, fail and end. Real signals, real process tables."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import Own, Train, small_recipe
from processes import is_running

import samestep
from samestep import NonFiniteLoss, Placement, Run, WorkerFailed
from samestep.messages import wire
from samestep.messages.training import Message, Stopped
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import Worker, _Supervision
from samestep.system.heartbeat import Heartbeat
from samestep.system.signals import Stop


DEADLINE = 120.0
LONG = ["--epochs", "1000", "--set", "model.hidden=[16]"]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true; fail after DEADLINE seconds."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def trains(out: Path) -> bool:
    """Return whether the run in `out` has logged a step."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


@contextmanager
def long_training(
    out: Path, *arguments: str
) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Yield a command in the middle of a training, and all processes below it."""
    command = [sys.executable, "-m", "samestep", "train", "--out", str(out), *LONG]
    with subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            wait_until(lambda: trains(out) or process.poll() is not None)
            yield process, psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()


def workers_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return the forked ones: their parent is among the processes too."""
    pids = {process.pid for process in processes}
    return [process for process in processes if process.ppid() in pids]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    """Return all events of one name."""
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def pids(out: Path) -> list[int]:
    """Return the workers' process ids, by rank."""
    found: list[int] = events(out, "workers started")[-1]["pids"]
    return found


def all_gone(processes: list[psutil.Process]) -> bool:
    return not any(is_running(process.pid) for process in processes)


def named_shared_memory(processes: list[psutil.Process]) -> list[str]:
    """Return the files of /dev/shm that they use, which a kill would leave there."""
    return [
        mapped.path
        for process in processes
        for mapped in process.memory_maps()
        if mapped.path.startswith("/dev/shm/")  # noqa: S108
    ]


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_everything_and_leaves_nothing(
    tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    with long_training(tmp_path / "run", "--workers", "3") as (process, below):
        assert len(workers_of(below)) == 3
        assert named_shared_memory(below) == []
        process.send_signal(number)
        assert process.wait(DEADLINE) == exit_code
        assert all_gone(below)
    assert Run.open(tmp_path / "run").status == "interrupted"
    assert not [*tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_workers_end_when_the_supervisor_is_killed(
    tmp_path: Path, exchange: str
) -> None:
    arguments = ("--workers", "2", "--exchange", exchange)
    with long_training(tmp_path / "run", *arguments) as (process, below):
        assert named_shared_memory(below) == []
        process.kill()
        wait_until(lambda: all_gone(below))


def test_a_small_dev_shm_does_not_matter(tmp_path: Path) -> None:
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    unshare = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, small], check=False, capture_output=True).returncode:
        pytest.skip("a mount namespace needs `unshare` and root")
    train = f"{sys.executable} -m samestep train --workers 2 --exchange shared"
    short = "--epochs 1 --set data.train_samples=600"
    ended = subprocess.run(
        [*unshare, f"{small} && {train} {short} --out {tmp_path}/run"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_stopped_worker_is_named(tmp_path: Path) -> None:
    arguments = ("--workers", "3", "--hang-timeout", "5", "--max-restarts", "0")
    with long_training(tmp_path / "run", *arguments) as (process, below):
        psutil.Process(pids(tmp_path / "run")[1]).suspend()
        _, stderr = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert all_gone(below)
    assert "late: worker 1 (stopped by a signal)." in stderr
    assert "Traceback" not in stderr


def test_an_error_is_shown_once_and_a_start_leaves_no_directory(tmp_path: Path) -> None:
    too_wide = "model.hidden=[2000000000]"
    arguments = ["train", "--workers", "2", "--set", too_wide]
    ended = subprocess.run(
        [sys.executable, "-m", "samestep", *arguments, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1
    last = ended.stderr.splitlines()[-1]
    assert re.match(r"Error: Worker [01] failed: RuntimeError: ", last)
    assert "DefaultCPUAllocator: can't allocate memory" in last
    (first,) = re.findall("(?m)^failure: .*$", ended.stderr)  # it was tried again
    assert "twice in a row" not in first
    assert "(log: " not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_a_training_survives_the_death_of_the_fork_server(tmp_path: Path) -> None:
    with long_training(tmp_path / "run", "--workers", "2") as (process, below):
        server = psutil.Process(workers_of(below)[0].ppid())
        server.kill()
        wait_until(lambda: all_gone(below))
        wait_until(lambda: len(events(tmp_path / "run", "training")) == 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 143
        assert process.stderr is not None
        assert "forks the workers has ended" in process.stderr.read()


@contextmanager
def importing(out: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """Yield a training whose fork server is just importing torch, and that server."""
    short = ["--epochs", "1", "--set", "data.train_samples=600", "--workers", "1"]
    command = [sys.executable, "-m", "samestep", "train", "--out", str(out), *short]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: psutil.Process(process.pid).children() != [])
            (server,) = psutil.Process(process.pid).children()
            maps = Path(f"/proc/{server.pid}/maps")
            wait_until(lambda: "libtorch" in maps.read_text())
            yield process, server
        finally:
            process.kill()


def test_a_fork_server_killed_while_it_imports_is_started_again(tmp_path: Path) -> None:
    with importing(tmp_path / "run") as (process, server):
        server.kill()
        _, stderr = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, stderr
    assert "error is above" not in stderr


def test_a_fork_server_killed_before_it_reads_a_message_has_ended() -> None:
    with ForkServer() as server:
        server.build()
        os.kill(server._process.pid, signal.SIGSTOP)
        server.kill(0)
        os.kill(server._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="has ended: it was killed by SIGKILL"):
            server.exits(DEADLINE)


def test_a_fork_server_that_still_imports_ends_with_its_supervisor(
    tmp_path: Path,
) -> None:
    with importing(tmp_path / "run") as (process, server):
        server.suspend()  # it cannot notice the end of its channel
        process.kill()
        wait_until(lambda: all_gone([server]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_without_restarts_a_dead_worker_fails_the_training(
    tmp_path: Path, number: signal.Signals
) -> None:
    arguments = ("--workers", "3", "--max-restarts", "0")
    with long_training(tmp_path / "run", *arguments) as (process, below):
        victim = pids(tmp_path / "run")[1]
        psutil.Process(victim).send_signal(number)
        _, stderr = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert all_gone(below)
    assert f"Worker 1 failed: it was killed by {number.name}" in stderr
    is_crash = number != signal.SIGKILL
    assert ('`arithmetic = "portable"`' in stderr) == is_crash
    assert stderr.count("Traceback") == 0
    run = Run.open(tmp_path / "run")
    assert run.status == "failed"
    assert number.name in run.result["error"]
    assert "weights_sha256" not in run.result


def test_a_diverging_training_names_the_first_micro_batch(train: Train) -> None:
    recipe = small_recipe(optimizer={"name": "sgd", "lr": 1e30})
    messages = set()
    for workers in (1, 2, 6):
        with pytest.raises(NonFiniteLoss) as caught:
            train(recipe, workers)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "at step 2 it became nan, first in micro-batch 0" in messages.pop()


def test_a_fork_server_survives_the_failure_of_a_training(
    tmp_path: Path, train: Train
) -> None:
    with pytest.raises(NonFiniteLoss):
        train(small_recipe(optimizer={"name": "sgd", "lr": 1e30}), 2)
    assert train(small_recipe(), 2).status == "finished"


def test_workers_write_nothing_into_their_logs_when_all_is_well(train: Train) -> None:
    run = train(small_recipe(), 2)
    logs = sorted((run.path / "logs").iterdir())
    assert [log.name for log in logs] == ["rank-0.log", "rank-1.log"]
    assert [log.read_text() for log in logs] == ["", ""]


def test_the_fork_server_has_one_thread(server: ForkServer, train: Train) -> None:
    train(small_recipe(), 1)
    assert psutil.Process(server._process.pid).num_threads() == 1


def test_a_worker_imports_no_symbolic_algebra(own: Own, tmp_path: Path) -> None:
    """It would make each start of a worker take twice as long."""
    recipe = own(
        "import sys\n"
        "def loss(outputs, targets):\n"
        "    assert 'sympy' not in sys.modules\n"
        "    return functional.cross_entropy(outputs, targets, reduction='none')\n"
    )
    where = Placement(workers=1, out=tmp_path / "run")
    with ForkServer() as server:  # gloo would have imported it into that of others
        assert samestep.train(recipe, where, server=server).status == "finished"


def test_events_are_ordered_by_a_monotonic_time(train: Train) -> None:
    run = train(small_recipe(), 2)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    names = [record["event"] for record in records]
    expected = ["started", "workers started", "training", "epoch", "checkpoint"]
    assert names == [*expected, "finished"]
    times = [record["seconds"] for record in records]
    assert times == sorted(times)


def test_a_worker_that_closed_its_socket_is_not_listened_to_any_more() -> None:
    """It would be readable for ever."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    listened: list[Message] = []
    polls = itertools.count()
    worker = Worker(0, 1, ours, Path("log"))
    heartbeat = Heartbeat.create(1)
    with ours, socket.socket() as quiet:
        theirs.sendall(wire.encode(Stopped(step=7)))
        theirs.close()
        server = SimpleNamespace(
            fileno=quiet.fileno, exits=lambda: [(1, 0)] if next(polls) == 5 else []
        )
        run = _Supervision(
            server,  # type: ignore[arg-type]
            [worker],
            Heartbeat(heartbeat),
            make_setup(small_recipe(), Placement(workers=1)),
            listened.append,
            Stop(),
        ).run
        receive, calls = worker.receive, itertools.count()
        worker.receive = lambda: (next(calls), receive())[1]  # type: ignore[method-assign]
        run()
    os.close(heartbeat)
    assert listened == [Stopped(step=7)]
    assert next(calls) <= 2
