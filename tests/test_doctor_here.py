"""The doctor's command on the machine that runs the tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import samestep

from samestep.doctor import observe
from samestep.doctor.peer import listen
from samestep.system import network_interfaces


TORCHS_OWN = """
import json, os, psutil, sys, torch
from datetime import timedelta
from torch.distributed import HashStore, ProcessGroupGloo
def listening():
    group = ProcessGroupGloo(HashStore(), 0, 1, timedelta(seconds=9))
    ours = psutil.Process().net_connections()
    return [one.laddr.ip for one in ours if one.status == "LISTEN"]
by_itself = listening()
os.environ["GLOO_SOCKET_IFNAME"] = sys.argv[1]
print(json.dumps({
    "addresses": [by_itself, listening()],
    "instruction_set": torch.backends.cpu.get_cpu_capability(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda or "",
}))
"""


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs Linux's /proc")
def test_what_is_said_of_torch_without_it_is_what_torch_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    name = network_interfaces.all_interfaces()[-1].name
    command = [sys.executable, "-c", TORCHS_OWN, name]
    torchs = json.loads(subprocess.check_output(command, timeout=120))
    host = observe.observe()
    named = network_interfaces.gloo_choice({"GLOO_SOCKET_IFNAME": name})
    assert torchs["addresses"] == [[host.gloo_address], [named.address]]
    assert torchs["torch"] == host.libraries["torch"]
    assert torchs["cuda"] == host.cuda
    assert host.instruction_set in (torchs["instruction_set"], "")


def test_the_doctor_examines_this_machine_without_importing_torch(
    tmp_path: Path,
) -> None:
    code = "import sys; from samestep.cli.main import main\ntry: main()\n"
    code += "finally: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    ended = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
    )
    assert ended.stderr == ""
    content = json.loads(ended.stdout)
    levels = [finding["level"] for finding in content["findings"]]
    assert ended.returncode == int("problem" in levels)
    assert content["facts"]["out"] == str(tmp_path)
    assert content["link"] is None


def test_a_problem_is_exit_code_1() -> None:
    ended = samestep("doctor", GLOO_SOCKET_IFNAME="no-such-interface")
    assert ended.returncode == 1
    assert "unset GLOO_SOCKET_IFNAME" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interface", "no-such"], "no interface, address or network"),
        (["--serve", "--peer", "b"], "`--serve` only answers"),
        (["--peer", "b:x"], "A peer is HOST or HOST:PORT"),
    ],
)
def test_what_cannot_be_examined_is_a_usage_error(
    arguments: list[str], message: str
) -> None:
    ended = samestep("doctor", *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr


def test_a_port_in_use_is_reported() -> None:
    with listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        ended = samestep("doctor", "--port", str(port), "--interface", "127.0.0.1")
        assert f"port {port} is in use" in ended.stdout
        ended = samestep("doctor", "--serve", "--port", str(port))
        assert ended.returncode == 2
        assert f"must listen on 127.0.0.1 port {port}" in ended.stderr
