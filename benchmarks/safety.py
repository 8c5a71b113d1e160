"""What snapshots and checkpoints cost, at the default cadence.

    python benchmarks/safety.py

A round trains the same recipe with and without them, one after the other. The time runs
from the first step to the end of the last epoch, evaluation included, as events.jsonl
has it, so that what a snapshot at the end of an epoch takes counts too. The cost is the
ratio within a round, minus one; the order alternates from round to round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


OFF = ("--snapshot-seconds", "0")


def seconds(run: Path, *options: str) -> float:
    """One training, from its first step to its last epoch's end."""
    command = [sys.executable, "-m", "samestep", "train", "--out", str(run), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    lines = (run / "events.jsonl").read_text().splitlines()
    times = {event["event"]: event["seconds"] for event in map(json.loads, lines)}
    return float(times["epoch"] - times["training"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    options = ("--epochs", str(arguments.epochs), "--workers", str(arguments.workers))
    ratios = []
    for index in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as directory:
            found = {}
            for name in ("off", "on")[:: 1 if index % 2 else -1]:
                extra = OFF if name == "off" else ()
                found[name] = seconds(Path(directory) / name, *options, *extra)
        ratios.append(found["on"] / found["off"])
        print(f"round {index + 1}: on {found['on']:.2f} s  off {found['off']:.2f} s")
    print(
        f"cost: median {statistics.median(ratios) - 1:.1%}, {min(ratios) - 1:.1%} to "
        f"{max(ratios) - 1:.1%}, n={len(ratios)}"
    )


if __name__ == "__main__":
    main()
