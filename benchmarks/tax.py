"""What synchronisation costs: two workers against two trainings that never talk.

    python benchmarks/tax.py --global-batch 64
    python benchmarks/tax.py --global-batch 512

A round measures, one after the other: samestep with 2 workers; two independent
trainings at the same time, each with half the samples and half the global batch, so
with the same steps and pieces; samestep with 1 worker. Two processes slow each other
down on most machines, so the speed-up over one worker also measures the machine; the
tax does not. An epoch's time leaves out start-up and evaluation; the first epoch is a
warm-up. The tax is the ratio within a round.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cleanup

from samestep import Run


Training = tuple[Path, subprocess.Popen[str]]


def train(directory: Path, name: str, *options: str) -> Training:
    out = directory / name
    command = [sys.executable, "-m", "samestep", "train", "mnist-mlp-classic"]
    return out, subprocess.Popen(
        [*command, "--out", str(out), "--no-report", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def epoch_seconds(*started: Training) -> float:
    """The slowest of the trainings; the median of its epochs after the first."""
    slowest = 0.0
    for out, process in started:
        _, errors = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"a training failed: {errors}")
        seconds = [epoch["seconds"] for epoch in Run.open(out).history]
        slowest = max(slowest, statistics.median(seconds[1:]))
    return slowest


def measure(
    batch: int, epochs: int, samples: int, directory: Path
) -> tuple[float, float, float]:
    """Return seconds per epoch: two workers, two that never talk, one worker."""
    common = ("--epochs", str(epochs), "--set")
    whole = (
        *(*common, f"data.train_samples={samples}"),
        *("--global-batch", str(batch), "--micro-batches", "2"),
    )
    half = (
        *(*common, f"data.train_samples={samples // 2}", "--workers", "1"),
        *("--global-batch", str(batch // 2), "--micro-batches", "1"),
    )
    together = epoch_seconds(train(directory, "2", *whole, "--workers", "2"))
    halves = [train(directory, name, *half) for name in ("left", "right")]
    apart = epoch_seconds(*halves)
    alone = epoch_seconds(train(directory, "1", *whole, "--workers", "1"))
    return together, apart, alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=60_000)
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs is at least 2, since the first one is left out")
    rows = []
    for index in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as directory:
            row = measure(
                *(arguments.global_batch, arguments.epochs, arguments.samples),
                Path(directory),
            )
        rows.append(row)
        print(f"round {index + 1}: " + "  ".join(f"{s:.2f} s" for s in row), flush=True)
    for name, ratios in (
        ("tax", [together / apart for together, apart, _ in rows]),
        ("speed-up over one worker", [alone / together for together, _, alone in rows]),
    ):
        spread = f"{min(ratios):.3f}-{max(ratios):.3f}"
        print(
            f"{name}: median {statistics.median(ratios):.3f}, {spread}, n={len(rows)}"
        )


if __name__ == "__main__":
    cleanup.run(main)
