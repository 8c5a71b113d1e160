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
from dataclasses import dataclass
from pathlib import Path

import cleanup

from samestep import Run


@dataclass(frozen=True)
class Options:
    """As given on the command line."""

    recipe: str
    blocks: int
    epochs: int
    seconds: float
    set: list[str]

    @property
    def changes(self) -> list[str]:
        """The options of a command that change fields of the recipe."""
        return [word for change in self.set for word in ("--set", change)]


def samestep(*arguments: str) -> None:
    command = [sys.executable, "-m", "samestep", *arguments]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"samestep {arguments[0]} failed: {ended.stderr}")


def pair(directory: Path, options: Options, index: int) -> float:
    """The speed-up in one pair of trainings, of which the first one alternates."""
    seconds = {}
    for workers in (1, 2) if index % 2 else (2, 1):
        out = directory / f"{index}-{workers}"
        given = ["--workers", str(workers), "--epochs", str(options.epochs)]
        given += ["--out", str(out), "--no-report", *options.changes]
        samestep("train", options.recipe, *given)
        seconds[workers] = float(Run.open(out).result["train_seconds"])
    return seconds[1] / seconds[2]


def rounds(directory: Path, options: Options, index: int) -> list[float]:
    """The speed-up in each of three rounds of `scale`."""
    out = directory / f"scale-{index}"
    given = ["--workers", "1,2", "--rounds", "3", "--seconds", str(options.seconds)]
    samestep("scale", options.recipe, *given, "--out", str(out), *options.changes)
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
    parser.add_argument(
        "--epochs", type=int, default=10, help="the first second is slower"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of `scale`")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    options = Options(**vars(parser.parse_args()))
    trained: list[float] = []
    scaled: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        for block in range(options.blocks):
            trained.append(pair(Path(name), options, block))
            scaled += rounds(Path(name), options, block)
            shown = ("trainings", trained[-1], "scale", *scaled[-3:])
            print(*(s if isinstance(s, str) else f"{s:.3f}" for s in shown), flush=True)
    for what, values in (("trainings", trained), ("scale", scaled)):
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{what}: {middle:.3f} ({low:.3f} to {high:.3f}, n={len(values)})")
    difference = statistics.median(scaled) / statistics.median(trained) - 1
    print(f"difference {difference:+.1%}")


if __name__ == "__main__":
    cleanup.run(main)
