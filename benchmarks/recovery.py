"""How long a training on several machines stands still after each kind of fault.

    python benchmarks/recovery.py                (all faults, once; again: adds rounds)
    python benchmarks/recovery.py power-lost --rounds 3

Needs root: 3 hosts with one worker each, network namespaces (hosts.py). The fault hits
the last of them in mid-epoch; seconds are those of the first, which survives:

    standstill   from the fault until all that are left begin to train again
    replay       until the step is reached again that was reached at the fault
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cleanup
import psutil
from hosts import Host, Network

from samestep.system import machine


HOSTS, PORT, PATIENCE = 3, 29400, 180.0
HANG_TIMEOUT = 10.0
RECIPE = ("mnist-mlp-classic", "--micro-batches", "8", "--epochs", "999")
Fields = dict[str, Any]


class Cluster:
    """A training on several hosts, and what its first host's run says."""

    def __init__(self, directory: Path, network: Network, stack: ExitStack) -> None:
        self.network, self._directory, self._stack = network, directory, stack
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.hosts = [network.add() for _ in range(HOSTS)]
        for host in self.hosts:
            self.start(host)
        self._run = directory / self.hosts[0].name / "run"

    def start(self, host: Host) -> None:
        """Start the command on one of the hosts."""
        command = [
            *(sys.executable, "-m", "samestep", "train", *RECIPE),
            *(
                "--nodes",
                f"1:{HOSTS}",
                "--rdzv-endpoint",
                f"{self.hosts[0].name}:{PORT}",
            ),
            *("--interface", "10.0.0.0/24", "--workers", "1"),
            *("--hang-timeout", str(HANG_TIMEOUT), "--no-report", "--no-tensorboard"),
            *("--out", str(self._directory / host.name / "run")),
        ]
        log = self._directory / f"{host.name}.log"
        output = self._stack.enter_context(log.open("ab"))
        started = host.start(command, stdout=output, stderr=output)
        self._processes[host.name] = started

    def worker(self, host: Host) -> psutil.Process:
        """Return the only worker there, a child of the fork server below torchrun."""
        below = psutil.Process(self._processes[host.name].pid).children(True)
        (server,) = [p for p in below if "torch.distributed.run" in parent_of(p)]
        (found,) = server.children()
        return found

    def events(self, *names: str) -> list[Fields]:
        """Return the events of these names that the first host recorded."""
        return [e for e in _lines(self._run / "events.jsonl") if e["event"] in names]

    @property
    def step(self) -> int:
        """Return the last step that the first host has logged."""
        steps = [r for r in _lines(self._run / "metrics.jsonl") if r["type"] == "step"]
        return int(steps[-1]["step"]) if steps else 0

    @property
    def members(self) -> int:
        """Return the number of hosts of the newest generation."""
        generations = self.events("generation")
        return len(generations[-1]["machines"]) if generations else 0

    def wait(self, condition: Callable[[], Any]) -> float:
        """Wait until the condition holds; return time.monotonic()."""
        end = time.monotonic() + PATIENCE
        while not condition():
            ended = self._processes[self.hosts[0].name].poll() is not None
            if ended or time.monotonic() > end:
                logs = [log.read_text() for log in self._directory.glob("*.log")]
                raise TimeoutError("\n".join(logs))
            time.sleep(0.01)
        return time.monotonic()


def parent_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process's parent."""
    parent = process.parent()
    return parent.cmdline() if parent else []


def _lines(file: Path) -> list[Fields]:
    """Return the complete lines of a file, parsed."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


def kill_worker(cluster: Cluster, host: Host) -> None:
    cluster.worker(host).kill()


def hang_worker(cluster: Cluster, host: Host) -> None:
    cluster.worker(host).send_signal(signal.SIGSTOP)


def kill_host(cluster: Cluster, host: Host) -> None:
    host.kill()


def lose_power(cluster: Cluster, host: Host) -> None:
    cluster.network.cut(host)
    host.kill()


def cut_off(cluster: Cluster, host: Host) -> None:
    cluster.network.cut(host)


FAULTS: dict[str, tuple[Callable[[Cluster, Host], None], int]] = {
    "worker-killed": (kill_worker, HOSTS),
    "worker-hangs": (hang_worker, HOSTS),
    "processes-killed": (kill_host, HOSTS - 1),
    "power-lost": (lose_power, HOSTS - 1),
    "cut-off": (cut_off, HOSTS - 1),
}
"""What happens to the last host, and how many hosts train afterwards."""


def measure(name: str) -> Fields:
    """Measure one fault. Raises TimeoutError if the training does not recover."""
    inflict, left = FAULTS[name]
    with (
        tempfile.TemporaryDirectory() as directory,
        Network("1gbit") as network,
        ExitStack() as stack,
    ):
        cluster = Cluster(Path(directory), network, stack)
        cluster.wait(lambda: cluster.members == HOSTS)
        begun = cluster.step
        cluster.wait(lambda: cluster.step > begun + 100)
        generations = len(cluster.events("generation"))
        hit, reached = time.monotonic(), cluster.step
        inflict(cluster, cluster.hosts[-1])

        def trains_again() -> bool:
            return (
                len(cluster.events("generation")) > generations
                and cluster.members == left
            )

        restarted = cluster.wait(trains_again)
        from_step = cluster.events("generation")[-1]["step"]
        replayed = cluster.wait(lambda: cluster.step >= reached)
    return {
        "standstill": restarted - hit,
        "replay": replayed - restarted,
        "steps": reached - from_step,
    }


def show(rounds: list[dict[str, Fields]]) -> None:
    """Print medians, with the range."""
    print(f"hang timeout {HANG_TIMEOUT:g} s; {HOSTS} hosts, 1 worker each")
    print("fault               n   standstill         replay")
    for name in FAULTS:
        runs = [run[name] for run in rounds if name in run]
        if not runs:
            continue
        cells = []
        for phase in ("standstill", "replay"):
            values = sorted(run[phase] for run in runs)
            middle = statistics.median(values)
            cells.append(f"{middle:5.1f} ({values[0]:.1f}-{values[-1]:.1f}) s")
        print(f"{name:18} {len(runs):2}   {'   '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all"
    )
    parser.add_argument("--rounds", type=int, default=1)
    default = Path(__file__).parent / "results" / "hosts-recovery.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    if unknown := set(options.faults) - FAULTS.keys():
        parser.error(f"faults are {', '.join(FAULTS)}; received {', '.join(unknown)}")
    rounds: list[dict[str, Fields]] = []
    if options.out.exists():
        rounds = json.loads(options.out.read_text())["rounds"]
    for _ in range(options.rounds):
        for name in options.faults or FAULTS:
            rounds.append({name: measure(name)})
            record = {"machine": machine.describe(), "rounds": rounds}
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    show(rounds)


if __name__ == "__main__":
    cleanup.run(main)
