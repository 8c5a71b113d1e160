"""The rules of SECURITY.md, each by a test; those on checkpoints in test_checkpoint.py.

A listening socket is looked for where the kernel lists them, not where we think.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import Train, small_recipe
from test_launch import DEADLINE, long_training

import samestep
from samestep.system import conditions, machine


PACKAGE = Path(samestep.__file__).parent
GLOO = ("--exchange", "gloo", "--workers", "2")
LISTEN, LOOPBACK = "0A", ("0100007F", "00000000000000000000000001000000")


def listening_inodes() -> dict[str, str]:
    """inode -> local address, from the kernel's tables of TCP sockets."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN:
                found[fields[9]] = fields[1].split(":")[0]
    return found


def socket_inodes(pid: int) -> set[str]:
    links = [
        str(fd.readlink())
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if fd.is_symlink()
    ]
    return {link[8:-1] for link in links if link.startswith("socket:[")}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("exchange", ["shared", "gloo"])
def test_nobody_listens_beyond_the_loopback_interface(
    tmp_path: Path, exchange: str
) -> None:
    arguments = ("--workers", "2", "--exchange", exchange)
    with long_training(tmp_path / "run", *arguments) as (process, below):
        addresses = listening_inodes()
        own = {
            addresses[inode]
            for running in [psutil.Process(process.pid), *below]
            for inode in socket_inodes(running.pid)
            if inode in addresses
        }
    assert own <= set(LOOPBACK)
    assert bool(own) == (exchange == "gloo")


PICKLES_OR_EVALUATES = "S102,S301,S302,S306,S307,S403,S506,S602"


def test_only_the_transport_of_user_code_unpickles_and_nothing_evaluates() -> None:
    """What a Python caller gives reaches the workers by memory, never from a file."""
    rules = ("--isolated", "--preview", "--ignore-noqa", "--select")
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", *rules, PICKLES_OR_EVALUATES),
            *("--output-format", "json", PACKAGE),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert {Path(f["filename"]).name for f in json.loads(ended.stdout)} == {
        "transport.py"
    }


INTEGRATIONS = {"accelerate", "lightning", "transformers"}
"""Their processes send each other pickled objects, as those libraries do themselves."""


def test_torch_unpickles_tensors_only() -> None:
    """ruff does not know torch's ways to unpickle."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        loads = re.findall(r"(?<!safetensors\.)torch\.load\(.*", text)
        assert all("weights_only=True" in call for call in loads), path
        if path.parent.name not in INTEGRATIONS:
            assert not re.search(r"dist\.\w+_object", text), path


@pytest.mark.parametrize(
    "name", ["../escape", "/etc/escape", "a/b", "..", "", "x" * 65]
)
def test_a_recipes_name_cannot_lead_out_of_the_runs_directory(name: str) -> None:
    overrides = {"name": name}
    if name == "..":  # a legal name: the run is then `..-<time>`, below runs/
        assert samestep.Recipe.load("mnist-mlp", overrides).name == ".."
        return
    with pytest.raises(samestep.RecipeError):
        samestep.Recipe.load("mnist-mlp", overrides)


def test_a_run_is_as_private_as_the_umask_asks(tmp_path: Path) -> None:
    arguments = ["train", "--epochs", "1", "--set", "data.train_samples=600"]
    ended = subprocess.run(
        [sys.executable, "-m", "samestep", *arguments, "--out", str(tmp_path / "run")],
        umask=0o077,
        capture_output=True,
        check=False,
        timeout=DEADLINE,
    )
    assert ended.returncode == 0, ended.stderr
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("cache", ["cache", "/proc/nowhere"])
def test_nothing_is_left_in_the_directory_of_temporary_files(
    tmp_path: Path, cache: str
) -> None:
    """Nor is anything looked for there under a name that others could make first."""
    (tmp_path / "temporary").mkdir()
    places = {"TMPDIR": "temporary", "SAMESTEP_CACHE": cache}
    environment = os.environ | {k: str(tmp_path / v) for k, v in places.items()}
    arguments = ["train", "--epochs", "1", "--set", "data.train_samples=600"]
    ended = subprocess.run(
        [sys.executable, "-m", "samestep", *arguments, *GLOO, "--out", "run"],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=DEADLINE,
    )
    assert ended.returncode == 0, ended.stderr
    own = {"cache"} if cache == "cache" else set()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "temporary"} | own
    assert not list((tmp_path / "temporary").iterdir())


def test_a_run_contains_no_value_of_the_environment(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "swordfish-4711")
    run = train(small_recipe(), 1)
    for path in run.path.rglob("*"):
        if path.is_file():
            assert b"swordfish-4711" not in path.read_bytes()


def test_of_the_environment_only_what_decides_bits_or_threads_is_recorded() -> None:
    variables = {**dict.fromkeys(os.environ, "swordfish"), "HOME": "swordfish"}
    assert conditions.described(variables) == conditions.NONE
    set_ = dict.fromkeys([*conditions.VARIABLES, *machine.THREAD_VARIABLES], "set")
    said = conditions.described({**variables, **set_})
    assert said == " ".join(f"{name}=set" for name in conditions.VARIABLES)
    # Whoever extends the list extends rule 7, too: none of these can be a secret.
    assert len(conditions.VARIABLES) == 24
    assert len(machine.THREAD_VARIABLES) == 4


def test_events_name_no_fault_unless_somebody_asked_for_one(train: Train) -> None:
    run = train(small_recipe(), 1)
    events = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    assert "fault" not in [event["event"] for event in events]
