"""Uneven workers: throughput over time with and without balancing.

    python benchmarks/balance.py half        one of 2 workers at half speed now and then
    python benchmarks/balance.py wandering   another one every 5 s
    python benchmarks/balance.py four        4 workers with 40, 40, 40 and 20% of a core
    python benchmarks/balance.py even        what balancing costs when there is no need

Needs Linux and at least 2 cores, to each of which one worker is pinned. A worker is
slowed from outside: by another process that computes on its core, or, with
`--by quota` and for `four`, by a CPU quota through cgroup v1 or v2 (needs root).
mnist-mlp-classic at global batch 512 in 32 micro-batches. Throughput is samples by
seconds of training, as in metrics.jsonl; start-up and evaluation are left out. A
computer's speed drifts, so what is compared is close in time: `half` has cycles of 8 s
slow and 12 s even, and each slow window is held against the even ones around it.
`--pace 0.1` goes through all that in a tenth of the time, to see that it runs; its
numbers say nothing, since balancing needs the seconds that it needs.
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
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import cleanup
from quota import Quota


RECIPE = ("mnist-mlp-classic", "--global-batch", "512", "--micro-batches", "32")
SETTLE = 8.0
"""Seconds from the first step until the first slowness."""
SLOW, CYCLE, CYCLES = 8.0, 20.0, 4

Curves = dict[str, list[tuple[float, float]]]
"""For `auto` and `off`: (seconds, share of the even throughput)"""
Script = list[tuple[float, int, float]]
"""(seconds since the first slowness, worker, its speed from then on), in order"""
Series = list[tuple[float, float, float]]
"""(seconds since the first slowness, samples, seconds of training them)"""


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    scenario: str
    rounds: int
    by: str
    pace: float
    plot: Path | None


class Brake(Protocol):
    """Slows one worker."""

    def set(self, speed: float) -> None:
        """Set the speed; 1 is full speed."""

    def close(self) -> None:
        """Restore full speed, after the worker has ended."""


class Neighbour:
    """A process that computes on the same core, of which each gets half."""

    def __init__(self, core: int) -> None:
        self._code = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
        self._process: subprocess.Popen[bytes] | None = None

    def set(self, speed: float) -> None:
        """Set the speed: 1 or 0.5."""
        self.close()
        if speed < 1:
            self._process = subprocess.Popen([sys.executable, "-c", self._code])

    def close(self) -> None:
        """End the neighbour, after the worker has ended."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Training:
    """One run of the command line, watched from outside.

    Its seconds are those of its clock divided by `pace`.
    """

    def __init__(self, out: Path, workers: int, balance: str, pace: float) -> None:
        self.out, self._pace = out, pace
        self._errors = out.with_name("errors")
        options = ["--out", str(out), "--workers", str(workers), "--epochs", "1000"]
        train = [sys.executable, "-m", "samestep", "train", *RECIPE]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [*train, *options, "--balance", balance],
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        self.reach(0.0)
        started = next(e for e in self.events("started"))
        self._origin = float(started["monotonic"])

    def pids(self) -> list[int]:
        return list(self.events("workers started")[-1]["pids"])

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self._lines("events.jsonl") if e["event"] == name]

    def now(self) -> float:
        """Return the seconds on the clock of its records."""
        return (time.monotonic() - self._origin) / self._pace

    def wait(self, moment: float) -> None:
        """Sleep until `now` is `moment`."""
        time.sleep(max(0.0, self._pace * (moment - self.now())))

    def reach(self, moment: float) -> None:
        """Wait until steps after `moment` were recorded; SystemExit if it fails."""
        while not any(at >= moment for at, *_ in self.series(0.0)):
            if self._process.poll() is not None:
                raise SystemExit(f"the training failed: {self._errors.read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def series(self, zero: float) -> Series:
        series, step = [], 0
        for record in self._lines("metrics.jsonl"):
            if record["type"] == "step":
                samples = 512 * (record["step"] - step)
                seconds = samples / record["samples_per_second"]
                series.append((record["at"] / self._pace - zero, samples, seconds))
                step = record["step"]
        return series

    def _lines(self, name: str) -> list[dict[str, Any]]:
        if not (self.out / name).exists():
            return []
        lines = (self.out / name).read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def watch(
    options: Options, workers: int, balance: str, script: Script, core: float = 1.0
) -> tuple[Series, int]:
    """Carry out a script; return the throughput and the number of rebalancings."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        out = Path(directory) / "run"
        training = Training(out, workers, balance, options.pace)
        cores = sorted(os.sched_getaffinity(0))
        brakes: list[Brake] = []
        for rank, pid in enumerate(training.pids()):
            own = cores[rank % len(cores)]
            os.sched_setaffinity(pid, [own])
            by_quota = options.by == "quota"
            brakes.append(Quota(pid, core) if by_quota else Neighbour(own))
            stack.callback(brakes[-1].close)
        zero = training.now() + SETTLE
        for moment, rank, speed in script:
            training.wait(zero + moment)
            brakes[rank].set(speed)
        training.reach(zero + script[-1][0])
        training.stop()
        return training.series(zero), len(training.events("rebalanced"))


def rate(series: Series, first: float, end: float) -> float:
    """Return the samples per second of training within a window.

    What a record says of the time since the one before counts by the part of that time
    that lies in the window.
    """
    samples = seconds = 0.0
    for (before, *_), (moment, number, taken) in pairwise(series):
        share = max(0.0, min(end, moment) - max(first, before)) / (moment - before)
        samples += share * number
        seconds += share * taken
    return samples / seconds


def half(options: Options) -> Curves:
    """One of two workers at half speed from 0 to 8 s (median of all cycles)"""
    script: Script = []
    for start in _starts():
        script += [(start, 1, 0.5), (start + SLOW, 1, 1.0)]
    script.append((CYCLES * CYCLE, 1, 1.0))
    found: dict[str, list[Cycle]] = {"auto": [], "off": []}
    for _ in range(options.rounds):
        for name, cycles in found.items():
            series, changes = watch(options, 2, name, script)
            cycles += [Cycle(series, start) for start in _starts()]
            ratios = (f"{cycle.during:.3f}" for cycle in cycles[-CYCLES:])
            print(f"{name:<4} {changes:2} changes; slow/even", *ratios, flush=True)
    for name, cycles in found.items():
        print(_spread(f"{name}, slow/even", [cycle.during for cycle in cycles]))
    print(f"bound: {(2 - 1 + 0.5) / 2:.3f}; 90% of it: {0.9 * (2 - 1 + 0.5) / 2:.3f}")
    for name, cycles in found.items():
        recovered = [cycle.recovered for cycle in cycles]
        print(_spread(f"{name}, from 5 s after slowness/before it", recovered))
    return {name: _fold(cycles) for name, cycles in found.items()}


@dataclass(frozen=True)
class Cycle:
    """Slowness from `start` on, and what is around it."""

    series: Series
    start: float

    @property
    def before(self) -> float:
        return rate(self.series, self.start - 5, self.start)

    @property
    def later(self) -> float:
        return rate(self.series, self.start + SLOW + 5, self.start + CYCLE)

    @property
    def during(self) -> float:
        """Return the throughput from 3 s on, relative to the even one."""
        slow = rate(self.series, self.start + 3, self.start + SLOW)
        return 2 * slow / (self.before + self.later)

    @property
    def recovered(self) -> float:
        """Return the throughput from 5 s after the slowness, relative to before it."""
        return self.later / self.before


def _fold(cycles: list[Cycle]) -> list[tuple[float, float]]:
    curve = []
    for half_seconds in range(-8, int(2 * CYCLE) - 8):
        moment = half_seconds / 2
        shares = [
            2
            * rate(c.series, c.start + moment - 0.5, c.start + moment + 0.5)
            / (c.before + c.later)
            for c in cycles
        ]
        curve.append((moment, statistics.median(shares)))
    return curve


def _starts() -> list[float]:
    return [index * CYCLE for index in range(CYCLES)]


def wandering(options: Options) -> None:
    """Half speed moves to the other of two workers every 5 s"""
    script: Script = []
    for turn in range(6):
        script += [(5.0 * turn, 1 - turn % 2, 1.0), (5.0 * turn, turn % 2, 0.5)]
    script.append((30.0, 0, 1.0))
    ratios = []
    for _ in range(options.rounds):
        found = {n: watch(options, 2, n, script)[0] for n in ("auto", "off")}
        auto, off = (rate(series, 0, 30) for series in found.values())
        ratios.append(auto / off)
        print(f"auto {auto:,.0f}/s  off {off:,.0f}/s  {auto / off:.2f}", flush=True)
    print(_spread("auto/off", ratios))


def four(options: Options) -> None:
    """One of four workers at half speed"""
    core, options = 0.4, replace(options, by="quota")
    shares: dict[str, list[float]] = {"auto": [], "off": []}
    for _ in range(options.rounds):
        calm: Script = [(14.0, 3, 1.0)]
        even = rate(watch(options, 4, "off", calm, core)[0], 0, 14)
        script = [(-5.9, 3, 0.5), (14.0, 3, 0.5)]
        found = {n: watch(options, 4, n, script, core)[0] for n in shares}
        for name, series in found.items():
            shares[name].append(rate(series, 0, 14) / (even * 3.5 / 4))
        last = "  ".join(f"{name} {values[-1]:.1%}" for name, values in shares.items())
        print(f"even {even:,.0f}/s; of the bound: {last}", flush=True)
    for name, values in shares.items():
        print(_spread(f"{name}/bound", values))


def even(options: Options) -> None:
    """Two workers of equal speed"""
    ratios, changes = [], 0
    for index in range(options.rounds):
        found = {}
        for balance in ("auto", "off")[:: 1 if index % 2 else -1]:
            found[balance], number = watch(options, 2, balance, [(24.0, 0, 1.0)])
            changes += number
        auto, off = (rate(found[name], -5, 24) for name in ("auto", "off"))
        ratios.append(auto / off)
        print(f"auto {auto:,.0f}/s  off {off:,.0f}/s  {auto / off:.3f}", flush=True)
    print(_spread("auto/off", ratios))
    print(f"{changes} rebalancings in {30 * options.rounds} s")


def _spread(name: str, values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{name}: median {middle:.3f}, {low:.3f} to {high:.3f}, n={len(values)}"


def draw(curves: Curves, path: Path, title: str) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "samestep"
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.axvspan(0, SLOW, color="0.93")
    axes.axhline(0.75, color="0.5", linewidth=0.8, linestyle="--")
    for name, label in (("auto", "balanced"), ("off", "not balanced")):
        axes.plot(*zip(*curves[name], strict=True), label=label)
    axes.annotate("bound", (SLOW, 0.75), ha="right", va="bottom", color="0.4")
    axes.set(xlabel="seconds", ylabel="share of even throughput", title=title)
    axes.set_ylim(0, 1.2)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scenarios = {"wandering": wandering, "four": four, "even": even}
    parser.add_argument("scenario", choices=["half", *scenarios])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--by", choices=["process", "quota"], default="process")
    parser.add_argument("--pace", type=float, default=1.0)
    parser.add_argument("--plot", type=Path, help="of `half`")
    options = Options(**vars(parser.parse_args()))
    if options.scenario != "half":
        scenarios[options.scenario](options)
        return
    curves = half(options)
    if options.plot is not None:
        draw(curves, options.plot, (half.__doc__ or "").strip())


if __name__ == "__main__":
    cleanup.run(main)
