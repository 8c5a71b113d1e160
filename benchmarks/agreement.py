"""Does `samestep scale` measure what trainings do?

    python benchmarks/agreement.py --blocks 5

The speed-up of 2 workers from `samestep scale --workers 1,2`, against that of whole
trainings: `train_seconds` of `samestep train` with 1 worker by that with 2. A block has
a pair of trainings and three rounds of `scale`, one after the other, since a machine
drifts; what is compared are the medians over all blocks.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from samestep import Run


EPOCHS = 10
"""The first second of a training is slower than the rest."""


def samestep(*arguments: str) -> None:
    command = [sys.executable, "-m", "samestep", *arguments]
    quiet = subprocess.DEVNULL
    subprocess.run(command, check=True, stdout=quiet, stderr=quiet, timeout=900)


def pair(directory: Path, recipe: str, index: int) -> float:
    """The speed-up in one pair of trainings, of which the first one alternates."""
    seconds = {}
    for workers in (1, 2) if index % 2 else (2, 1):
        out = directory / f"{index}-{workers}"
        given = ("--workers", str(workers), "--epochs", str(EPOCHS), "--out", str(out))
        samestep("train", recipe, *given, "--no-report")
        seconds[workers] = float(Run.open(out).result["train_seconds"])
    return seconds[1] / seconds[2]


def rounds(directory: Path, recipe: str, index: int) -> list[float]:
    """The speed-up in each of three rounds of `scale`."""
    out = directory / f"scale-{index}"
    samestep("scale", recipe, "--workers", "1,2", "--rounds", "3", "--out", str(out))
    points = json.loads((out / "scaling.json").read_text())["points"]
    one, two = (
        next(p["runs"] for p in points if (p["kind"], p["workers"]) == ("strong", n))
        for n in (1, 2)
    )
    pairs = zip(one, two, strict=True)
    return [b["samples_per_second"] / a["samples_per_second"] for a, b in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="mnist-mlp")
    parser.add_argument("--blocks", type=int, default=5)
    options = parser.parse_args()
    trained: list[float] = []
    scaled: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for block in range(options.blocks):
            trained.append(pair(Path(name), options.recipe, block))
            scaled += rounds(Path(name), options.recipe, block)
            shown = ("trainings", trained[-1], "scale", *scaled[-3:])
            print(*(s if isinstance(s, str) else f"{s:.3f}" for s in shown), flush=True)
    for what, values in (("trainings", trained), ("scale", scaled)):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{what}: {middle:.3f} ({low:.3f} to {high:.3f}, n={len(values)})")
    difference = statistics.median(scaled) / statistics.median(trained) - 1
    print(f"difference {difference:+.1%}")


if __name__ == "__main__":
    main()
