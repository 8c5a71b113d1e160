"""Uneven workers: throughput over time with and without balancing.

    python benchmarks/balance.py half        one of 2 workers at half speed for a while
    python benchmarks/balance.py wandering   another one every 5 s
    python benchmarks/balance.py four        4 workers with 40, 40, 40 and 20% of a core
    python benchmarks/balance.py even        what balancing costs when there is no need

Needs Linux with cgroup v1 or v2 and root: a worker is slowed by a CPU quota, which
counts its time and nothing else. mnist-mlp-classic at global batch 512 in 32
micro-batches. Throughput is steps between two lines of metrics.jsonl over the time
between them; start-up is left out. `--plot` draws the first pair of trainings.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any


RECIPE = ("mnist-mlp-classic", "--global-batch", "512", "--micro-batches", "32")
PERIOD_US = 100_000
SETTLE = 6.0
"""Seconds from the first step until the first slowness."""

Series = list[tuple[float, float]]
"""(seconds since the first slowness, samples per second)"""


class Quota:
    """A cgroup for one process."""

    def __init__(self, pid: int) -> None:
        v1 = Path("/sys/fs/cgroup/cpu")
        self._is_v1 = v1.is_dir()
        root = v1 if self._is_v1 else Path("/sys/fs/cgroup")
        self._path = root / f"samestep-benchmark-{pid}"
        self._path.mkdir()
        self._root, self._pid = root, pid
        (self._path / "cgroup.procs").write_text(str(pid))

    def set(self, share: float) -> None:
        """Of one core; 1 is no limit."""
        quota = -1 if share >= 1 else int(share * PERIOD_US)
        if self._is_v1:
            (self._path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._path / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            limit = "max" if quota < 0 else str(quota)
            (self._path / "cpu.max").write_text(f"{limit} {PERIOD_US}")

    def close(self) -> None:
        """Once the process has ended."""
        end = time.monotonic() + 10
        while (self._path / "cgroup.procs").read_text() and time.monotonic() < end:
            time.sleep(0.01)
        self._path.rmdir()


class Training:
    """One run of the command line, watched from outside."""

    def __init__(self, out: Path, workers: int, balance: str) -> None:
        self.out = out
        options = ["--out", str(out), "--workers", str(workers), "--epochs", "1000"]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "samestep", "train", *RECIPE, *options),
                *("--balance", balance),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._lines("metrics.jsonl"):
            if self._process.poll() is not None:
                raise SystemExit(f"the training failed: see {out}")
            time.sleep(0.02)
        started = next(e for e in self.events("started"))
        self._origin = float(started["monotonic"])

    def pids(self) -> list[int]:
        return list(self.events("workers started")[-1]["pids"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self._lines("events.jsonl") if e["event"] == name]

    def now(self) -> float:
        """Seconds on the clock of its records."""
        return time.monotonic() - self._origin

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def throughput(self, zero: float) -> Series:
        records = [r for r in self._lines("metrics.jsonl") if r["type"] == "step"]
        series = []
        for before, after in pairwise(records):
            seconds = after["at"] - before["at"]
            rate = 512 * (after["step"] - before["step"]) / seconds
            series.append((after["at"] - zero, rate))
        return series

    def _lines(self, name: str) -> list[dict[str, Any]]:
        if not (self.out / name).exists():
            return []
        lines = (self.out / name).read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def watch(
    workers: int,
    balance: str,
    script: list[tuple[float, Callable[[list[Quota]], None]]],
) -> tuple[Series, int]:
    """Carries out a script of (seconds, action); the throughput and rebalancings."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        training = Training(Path(directory) / "run", workers, balance)
        quotas = [Quota(pid) for pid in training.pids()]
        for quota in quotas:
            stack.callback(quota.close)
        zero = training.now() + SETTLE
        for moment, action in script:
            time.sleep(max(0.0, zero + moment - training.now()))
            action(quotas)
        training.stop()
        return training.throughput(zero), len(training.events("rebalanced"))


def rate(series: Series, first: float, end: float) -> float:
    """Median samples per second within a window."""
    found = [value for moment, value in series if first <= moment < end]
    return statistics.median(found) if found else 0.0


def limit(rank: int, share: float) -> Callable[[list[Quota]], None]:
    return lambda quotas: quotas[rank].set(share)


def nothing(_: list[Quota]) -> None:
    """The end of a script."""


def half(rounds: int, plot: Path | None) -> None:
    script = [(0.0, limit(1, 0.5)), (12.0, limit(1, 1.0)), (24.0, nothing)]
    bound = (2 - 1 + 0.5) / 2
    for index in range(rounds):
        found = {}
        for balance in ("auto", "off"):
            series, changes = watch(2, balance, script)
            found[balance] = series
            even = rate(series, -4, 0)
            slow, after = rate(series, 3, 12), rate(series, 17, 24)
            print(
                f"round {index + 1} {balance:<5} even {even:,.0f}/s  slow, after 3 s: "
                f"{slow / (even * bound):.1%} of the bound  after it, 5 s later: "
                f"{after / even:.1%} of even  {changes} changes",
                flush=True,
            )
        if plot is not None and index == 0:
            draw(found, plot, "one of two workers at half speed from 0 to 12 s")


def wandering(rounds: int, plot: Path | None) -> None:
    script: list[tuple[float, Callable[[list[Quota]], None]]] = []
    for turn in range(6):
        script += [(5.0 * turn, limit(1 - turn % 2, 1.0))]
        script += [(5.0 * turn, limit(turn % 2, 0.5))]
    script.append((30.0, nothing))
    ratios = []
    for _ in range(rounds):
        found = {name: watch(2, name, script)[0] for name in ("auto", "off")}
        means = {
            name: statistics.mean(v for t, v in series if 0 <= t < 30)
            for name, series in found.items()
        }
        ratios.append(means["auto"] / means["off"])
        print(f"auto {means['auto']:,.0f}/s  off {means['off']:,.0f}/s", flush=True)
        if plot is not None:
            draw(found, plot, "the slow worker changes every 5 s")
    print(f"ratio: {min(ratios):.2f} to {max(ratios):.2f}, n={rounds}")


def four(rounds: int, plot: Path | None) -> None:
    for _ in range(rounds):
        rates = {}
        for name, shares, balance in (
            ("even", (0.4, 0.4, 0.4, 0.4), "off"),
            ("auto", (0.4, 0.4, 0.4, 0.2), "auto"),
            ("off", (0.4, 0.4, 0.4, 0.2), "off"),
        ):
            script = [(-5.9, limit(r, share)) for r, share in enumerate(shares)]
            series, _ = watch(4, balance, [*script, (14.0, nothing)])
            rates[name] = statistics.mean(v for t, v in series if t > 0)
        bound = rates["even"] * 3.5 / 4
        print(
            f"even {rates['even']:,.0f}/s  auto {rates['auto'] / bound:.1%} of the "
            f"bound  off {rates['off'] / bound:.1%}",
            flush=True,
        )
    assert plot is None, "there is nothing to draw"


def even(rounds: int, plot: Path | None) -> None:
    ratios, changes = [], 0
    for index in range(rounds):
        found = {}
        for balance in ("auto", "off")[:: 1 if index % 2 else -1]:
            series, number = watch(2, balance, [(14.0, nothing)])
            found[balance] = statistics.mean(v for t, v in series if t > -5)
            changes += number
        ratios.append(found["auto"] / found["off"])
        print(f"auto {found['auto']:,.0f}/s  off {found['off']:,.0f}/s", flush=True)
    print(
        f"auto/off: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to "
        f"{max(ratios):.3f}, n={rounds}; {changes} rebalancings in {20 * rounds} s"
    )
    assert plot is None, "there is nothing to draw"


def draw(found: dict[str, Series], path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3))
    for name, series in found.items():
        smooth = [
            (
                series[i][0],
                statistics.median(v for _, v in series[max(0, i - 4) : i + 5]),
            )
            for i in range(len(series))
        ]
        label = "balanced" if name == "auto" else "not balanced"
        axes.plot(*zip(*smooth, strict=True), label=label)
    axes.set(xlabel="seconds", ylabel="samples per second", title=title, ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scenarios = {"half": half, "wandering": wandering, "four": four, "even": even}
    parser.add_argument("scenario", choices=scenarios)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("A CPU quota needs root: run this as root.")
    scenarios[arguments.scenario](arguments.rounds, arguments.plot)


if __name__ == "__main__":
    main()
