"""The workers that a fork server starts for torchrun."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed.elastic.multiprocessing.api as torchrun
from processes import reserved_port
from torch.distributed.elastic.multiprocessing.subprocess_handler import (
    SubprocessHandler,
)

from samestep.elastic.rendezvous.forked import COMMAND, STARTS, let_torchrun_fork


DEADLINE = 60.0
Start = Callable[..., SubprocessHandler]


@pytest.fixture(scope="module")
def _torchrun() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchrun, STARTS, None)
        let_torchrun_fork()
        yield


@pytest.fixture
def start(_torchrun: None, tmp_path: Path) -> Iterator[Start]:
    """`start(*words)`: a process as torchrun starts it, which prints into `out`."""
    handlers: list[SubprocessHandler] = []

    def run(*words: str, env: dict[str, str] | None = None) -> SubprocessHandler:
        handler: SubprocessHandler = getattr(torchrun, STARTS)(
            entrypoint=words[0],
            args=words[1:],
            env=env or {},
            stdout=str(tmp_path / "out"),
            stderr=None,
            local_rank_id=0,
            numa_options=None,
        )
        handlers.append(handler)
        return handler

    yield run
    for handler in handlers:
        handler.close(signal.SIGKILL)
        if handler._stdout:
            handler._stdout.close()


@pytest.fixture
def waiting() -> Iterator[dict[str, str]]:
    """Yield variables of a worker that waits for the others."""
    with reserved_port() as port:
        yield {
            **dict.fromkeys(("RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE"), "1"),
            **dict.fromkeys(("WORLD_SIZE", "GROUP_WORLD_SIZE"), "2"),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


TRAIN = (*COMMAND, "train", "mnist-mlp", "--out", "never-written")


def server_of(handler: SubprocessHandler) -> psutil.Process:
    """Return the fork server of a worker."""
    parent = psutil.Process(handler.proc.pid).parent()
    assert parent is not None
    assert "samestep.training.forkserver" in parent.cmdline()
    return parent


def test_torchrun_gets_the_output_and_the_exit_code_of_a_forked_worker(
    start: Start, tmp_path: Path
) -> None:
    assert start(*COMMAND, "--help").proc.wait(DEADLINE) == 0
    assert "Usage: " in (tmp_path / "out").read_text()
    assert start(*COMMAND, "fly").proc.wait(DEADLINE) == 2


def test_torchrun_can_wait_for_a_forked_worker_and_end_it(
    start: Start, waiting: dict[str, str]
) -> None:
    worker = start(*TRAIN, env=waiting)
    assert os.getpgid(worker.proc.pid) == worker.proc.pid
    assert worker.proc.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        worker.proc.wait(0.01)
    worker.close(signal.SIGKILL)
    assert worker.proc.wait(DEADLINE) == worker.proc.poll() == -signal.SIGKILL
    worker.close(signal.SIGTERM)  # does nothing


def test_one_process_forks_all_workers_and_ignores_signals_for_the_job(
    start: Start, waiting: dict[str, str]
) -> None:
    server = server_of(start(*TRAIN, env=waiting))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        server.send_signal(number)
    second = start(*TRAIN, env=waiting)
    assert server_of(second) == server
    second.close(signal.SIGTERM)
    assert second.proc.wait(DEADLINE) in (143, -signal.SIGTERM)


def test_a_fork_server_that_was_killed_is_replaced(
    start: Start, waiting: dict[str, str]
) -> None:
    worker = start(*TRAIN, env=waiting)
    server = server_of(worker)
    server.kill()
    assert worker.proc.wait(DEADLINE) == 1
    assert server_of(start(*TRAIN, env=waiting)) != server


def test_other_commands_of_torchrun_start_as_before(
    start: Start, tmp_path: Path
) -> None:
    ended: Any = start(sys.executable, "-c", "print(7)").proc
    assert isinstance(ended, subprocess.Popen)
    assert ended.wait(DEADLINE) == 0
    assert (tmp_path / "out").read_text() == "7\n"
