"""A run directory from a stranger: nothing leads out of it, whatever is done to it."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Train, small_recipe
from test_resume import forget_after, resume

import samestep
from samestep import Run, RunError, report
from samestep.errors import OutputError
from samestep.files import atomic
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.resume import find_start


KEY = "ssh-ed25519 AAAA stranger"
UNFINISHED = {"recipe": {}, "status": "interrupted", "epochs": []}


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A run whose recipe fails with a text of its author's, on a line of its own."""
    run = tmp_path / "evil"
    (run / "logs").mkdir(parents=True)
    recipe = small_recipe().changed({"freeze": [f"zzz\n{KEY}\n#"]})
    (run / "recipe.toml").write_text(recipe.to_toml())
    (run / "result.json").write_text(json.dumps(UNFINISHED))
    return run


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the reader's, beside the run."""
    file = tmp_path / "home" / "authorized_keys"
    file.parent.mkdir()
    file.write_text("mine\n")
    return file


def is_untouched(victim: Path) -> bool:
    return victim.read_text() == "mine\n" and list(victim.parent.iterdir()) == [victim]


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_a_log_that_is_a_link_lets_nobody_write_into_my_files(
    evil: Path, victim: Path, server: ForkServer, link: Callable[[Path, Path], None]
) -> None:
    link(evil / "logs" / "rank-0.log", victim)
    with pytest.raises((RunError, OutputError), match=r"rank-0\.log.* link"):
        resume(evil, server)
    assert is_untouched(victim)


PARTS = (
    *(".lock", "generation", "logs", "checkpoints", "state", "tensorboard"),
    *("metrics.jsonl", "events.jsonl", "result.json", "environment.json"),
    *("report.html", "report-figures", "trace.json", "logs/rank-3.log", "x/y/z"),
    *(".metrics.jsonl.1.tmp", "model.safetensors", "exported.safetensors"),
)


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        one.bind(path.name)
        os.chdir(here)


def link_out(path: Path) -> None:
    path.symlink_to("/")


COMMANDS: dict[str, Callable[[Path, ForkServer], object]] = {
    "resume": lambda run, server: resume(run, server),
    "evaluate": lambda run, server: samestep.evaluate(run, server=server),
    "export": lambda run, _: Run.open(run).export(),
    "compare": lambda run, _: Run.open(run).history,
    "report": lambda run, _: report.write(run),
}


def spoil(run: Path, part: str, make: Callable[[Path], None]) -> list[Path]:
    """Replace one part of the run by something else; return all of its files."""
    path = run / part
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    make(path)
    return sorted(run.rglob("*"))


@pytest.mark.parametrize("part", PARTS)
def test_a_link_anywhere_in_a_run_is_refused(evil: Path, part: str) -> None:
    before = spoil(evil, part, link_out)
    with pytest.raises(RunError, match=f"{Path(part).name} is a symbolic link"):
        find_start(evil, None)
    assert sorted(evil.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("make", "what"),
    [(link_out, "symbolic link"), (os.mkfifo, "named pipe"), (listener, "socket")],
)
def test_no_command_takes_a_run_with_more_than_files_and_directories(
    evil: Path,
    server: ForkServer,
    command: str,
    make: Callable[[Path], None],
    what: str,
) -> None:
    before = spoil(evil, "x/metrics.jsonl", make)
    with pytest.raises(RunError, match=rf"metrics\.jsonl is a {what}"):
        COMMANDS[command](evil, server)
    assert sorted(evil.rglob("*")) == before


def test_a_directory_of_checkpoints_that_is_a_link_is_left_alone(
    train: Train, server: ForkServer, tmp_path: Path
) -> None:
    run = train(small_recipe(epochs=2), 1, keep_checkpoints=2).path
    forget_after(run, checkpoint.steps(checkpoint.directory_of(run))[0])
    elsewhere = tmp_path / "elsewhere"
    (run / "checkpoints").rename(elsewhere)
    (elsewhere / ".step-1.1.tmp").mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(RunError, match="checkpoints is a symbolic link"):
        resume(run, server)
    assert sorted(elsewhere.rglob("*")) == before


def test_a_run_may_be_reached_by_a_link_of_ones_own(
    train: Train, server: ForkServer, tmp_path: Path
) -> None:
    run = train(small_recipe(epochs=2), 1, keep_checkpoints=2)
    forget_after(run.path, checkpoint.steps(checkpoint.directory_of(run.path))[0])
    (tmp_path / "mine").symlink_to(run.path)
    again = resume(tmp_path / "mine", server)
    assert again.weights_sha256 == run.weights_sha256


def test_what_waits_under_a_temporary_name_is_not_written_to(
    tmp_path: Path, victim: Path
) -> None:
    (tmp_path / f".metrics.jsonl.{os.getpid()}.tmp").symlink_to(victim)
    atomic.write(tmp_path / "metrics.jsonl", b"new")
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"new"
    assert is_untouched(victim)
