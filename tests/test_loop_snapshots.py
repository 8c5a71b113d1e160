"""A loop under torchrun goes on from memory after workers were killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_loop import DEADLINE, by_workers, data, network, threads
from test_loop_weights import GAN

import samestep
from samestep import OwnCodeError
from samestep.loop import snapshots


assert threads  # the fixture for every test here
SCRIPT = """
import json, os, signal
from pathlib import Path
import torch
from torch import nn
import samestep

KILLS = {0: (1, 0, 3), 1: (0, 1, 2)}
restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "-1"))
x = torch.randn(46, 5, generator=torch.Generator().manual_seed(0))
samples = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
torch.manual_seed(3)
layers = nn.Linear(5, 8), nn.Dropout(0.1), nn.BatchNorm1d(8), nn.Linear(8, 3)
model = nn.Sequential(*layers)
optimizer = torch.optim.Adam(model.parameters(), 0.01)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
loop = samestep.Loop(model, micro_batches=4, balance="random")
loop.keep(2, optimizer=optimizer, scheduler=scheduler)
begun = False
for epoch in range(loop.epoch, 3):
    for step in loop.steps(samples, 12, epoch):
        at = epoch, loop._position.step
        if not begun:
            Path(f"begun-{restart}-{loop.rank}").write_text(json.dumps(at))
            begun = True
        if KILLS.get(restart) == (loop.rank, *at):
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.param_groups[0]["lr"] *= 1 + 0.1 * torch.rand(()).item()
        for inputs, targets in step:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            loop.add(loss=loss * len(targets))
        optimizer.step()
    scheduler.step()
    loop.print(epoch, loop.mean(), loop.fingerprint())
"""


def files(pid: int) -> list[Path]:
    """Return the snapshots that an agent has left."""
    return list(snapshots.MEMORY.glob(f"{snapshots.PREFIX}-{pid}-*"))


def test_killed_workers_lose_two_steps_at_most_and_no_bit(tmp_path: Path) -> None:
    """One of them writes the snapshots, the other does not. Their shares move."""
    undisturbed = by_workers(SCRIPT, tmp_path, 1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with subprocess.Popen(
        [*torchrun, "--nproc-per-node=2", "--max-restarts=2", "script.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as agent:
        found, errors = agent.communicate(timeout=DEADLINE)
    assert agent.returncode == 0, errors
    begun = {
        file.name: json.loads(file.read_text()) for file in tmp_path.glob("begun-*")
    }
    # Killed before step 3 of epoch 0, then before step 2 of epoch 1, the ninth.
    assert begun["begun-0-0"] == begun["begun-0-1"] == [0, 0]
    assert begun["begun-1-0"] == begun["begun-1-1"] == [0, 2]
    assert begun["begun-2-0"] == begun["begun-2-1"] == [1, 2]
    assert found.splitlines() == undisturbed
    assert files(agent.pid) == []


KEEP = """
loops[0].keep(
    2, generator=generator, other=loops[1], one=optimizers[0], two=optimizers[1]
)
steps_taken = 0
for epoch in range(loops[0].epoch, 2):"""
STOP = """
        optimizers[1].step()
        steps_taken += 1
        if os.environ.get("STOP") == str(steps_taken):
            os._exit(9)
"""


def test_two_networks_that_take_turns_go_on_from_one_snapshot(tmp_path: Path) -> None:
    """The parent of both processes is this one, which so is the agent."""
    script = GAN.replace("\nfor epoch in range(2):", KEEP)
    script = "import os\n" + script.replace("\n        optimizers[1].step()\n", STOP)
    (tmp_path / "script.py").write_text(script + "loops[0].print(steps_taken)\n")
    lines = []
    agent = {"TORCHELASTIC_MAX_RESTARTS": "1", "LOCAL_RANK": "0"}
    for code, environment in ((0, {}), (9, {**agent, "STOP": "4"}), (0, agent)):
        ended = subprocess.run(
            [sys.executable, "script.py"],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        lines.append(ended.stdout)
        assert len(files(os.getpid())) == (2 if code == 9 else 0)  # and its lock
    fingerprints = lines[0].splitlines()[0]
    assert lines == [f"{fingerprints}\n6\n", "", f"{fingerprints}\n4\n"]


def test_what_a_job_that_failed_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    left = tmp_path / f"{snapshots.PREFIX}-{ended.pid}-123.pt"
    left.touch()
    own = tmp_path / "another-program-1-2.pt"
    own.touch()
    snapshots.remove_stale(tmp_path)
    assert not left.exists()
    assert own.exists()


@pytest.mark.parametrize("missing", ["optimizer", "schedule"])
def test_a_snapshot_without_the_optimizer_or_its_schedule_is_refused(
    missing: str,
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loop = samestep.Loop(model, micro_batches=2)
    loop.keep(1, **({} if missing == "optimizer" else {"optimizer": optimizer}))
    for x, _ in next(loop.steps(data(), 25, 0)):
        torch.autograd.backward(model(x).sum())
    with pytest.raises(OwnCodeError, match=f"this one has no {missing} for SGD"):
        optimizer.step()


def test_two_loops_of_a_script_do_not_both_keep_snapshots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor read what is not theirs."""
    monkeypatch.setattr(snapshots, "MEMORY", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(snapshots, "PATIENCE_SECONDS", 0.0)
    loop = samestep.Loop(network(), micro_batches=2)
    loop.keep(1)
    with pytest.raises(OwnCodeError, match="pass it the other loops"):
        samestep.Loop(network(), micro_batches=2).keep(1, other=loop)
