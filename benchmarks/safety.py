"""What snapshots and checkpoints cost, at the default cadence.

    python benchmarks/safety.py

A round trains the same recipe with and without them, one after the other. The time runs
from the first step to the end of the last epoch, evaluation included, as events.jsonl
has it, so that what a snapshot at the end of an epoch takes counts too. The cost is the
ratio within a round, minus one; the order alternates from round to round. Standstill is
the share of that time in which rank 0 copied snapshots instead of training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import cleanup


OFF = ("--snapshot-seconds", "0")


def seconds(run: Path, *options: str) -> tuple[float, float]:
    """One training, from its first step to its last epoch's end; its standstill."""
    command = [sys.executable, "-m", "samestep", "train", "--out", str(run)]
    command += ["--no-report", *options]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"a training failed: {ended.stderr}")
    lines = (run / "events.jsonl").read_text().splitlines()
    times = {event["event"]: event["seconds"] for event in map(json.loads, lines)}
    standstill = json.loads((run / "result.json").read_text())["snapshot_seconds"]
    return times["epoch"] - times["training"], standstill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    arguments = parser.parse_args()
    options = ["--epochs", str(arguments.epochs), "--workers", str(arguments.workers)]
    options += [word for change in arguments.set for word in ("--set", change)]
    ratios, shares = [], []
    for index in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as directory:
            found = {}
            for name in ("off", "on")[:: 1 if index % 2 else -1]:
                extra = OFF if name == "off" else ()
                found[name] = seconds(Path(directory) / name, *options, *extra)
        (on, standstill), (off, _) = found["on"], found["off"]
        ratios.append(on / off)
        shares.append(standstill / on)
        print(f"round {index + 1}: on {on:.2f} s  off {off:.2f} s", flush=True)
    print(
        f"cost: median {statistics.median(ratios) - 1:.1%}, {min(ratios) - 1:.1%} to "
        f"{max(ratios) - 1:.1%}, n={len(ratios)}\n"
        f"standstill: median {statistics.median(shares):.2%}, {min(shares):.2%} to "
        f"{max(shares):.2%}, n={len(shares)}"
    )


if __name__ == "__main__":
    cleanup.run(main)
