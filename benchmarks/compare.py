"""samestep and its peers, side by side in one run: A B C A B C ...

    python benchmarks/compare.py mnist-mlp-classic plain-1 samestep-1 --rounds 5

Every round runs every contender once, in a fresh process, for EPOCHS epochs. An epoch's
time leaves out start-up and evaluation; the first epoch of each process is a warm-up
and is left out too. The ratio is taken within a round, to the first contender, so that
the drift of the machine's speed cancels. Nothing else should run on the machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from samestep import Run, machine


HERE = Path(__file__).parent
PYTHON = sys.executable


@dataclass(frozen=True)
class Measurement:
    """One process: seconds of its epochs after the first, and of all of it."""

    epoch_seconds: float
    wall_seconds: float
    peak_megabytes: float
    test_accuracy: float


def peer(script: str, threads: int, workers: int = 0) -> Callable[..., list[str]]:
    """The command of a script in `peers`; with `workers`, under torchrun."""
    launch = [PYTHON]
    if workers:
        torchrun = [PYTHON, "-m", "torch.distributed.run", "--standalone"]
        launch = [*torchrun, f"--nproc-per-node={workers}"]

    def command(recipe: str, epochs: int, _: Path) -> list[str]:
        path = str(HERE / "peers" / f"{script}.py")
        return [*launch, path, recipe, str(epochs), str(threads)]

    return command


def samestep(workers: int, *options: str) -> Callable[..., list[str]]:
    """The command line that a user would type."""

    def command(recipe: str, epochs: int, out: Path) -> list[str]:
        train = [PYTHON, "-m", "samestep", "train", recipe, "--epochs", str(epochs)]
        return [*train, "--workers", str(workers), "--out", str(out), *options]

    return command


CONTENDERS = {
    "plain-1": peer("plain", threads=1),
    "plain-2": peer("plain", threads=2),
    "ddp-2": peer("ddp", threads=1, workers=2),
    "samestep-1-whole": samestep(1, "--micro-batches", "1"),
    "samestep-2-halves": samestep(2, "--micro-batches", "2"),
    "samestep-1": samestep(1),
    "samestep-2": samestep(2),
}


def measure(name: str, recipe: str, epochs: int) -> Measurement:
    """Runs one contender once."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        start = time.perf_counter()
        process = subprocess.Popen(
            CONTENDERS[name](recipe, epochs, out),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "2" if name == "plain-2" else "1"},
        )
        stdout, stderr = process.communicate(timeout=1800)
        wall = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(f"{name} failed:\n{stderr.decode()}")
        if name.startswith("samestep"):
            result = Run.open(out).result
            seconds = [epoch["seconds"] for epoch in result["epochs"]]
            accuracy = result["test_accuracy"]
        else:
            printed = json.loads(stdout.splitlines()[-1])
            seconds, accuracy = printed["epoch_seconds"], printed["test_accuracy"]
    return Measurement(statistics.median(seconds[1:]), wall, 0.0, accuracy)


def summarise(rounds: list[dict[str, Measurement]]) -> list[dict[str, float | str]]:
    """Median and range over the rounds; ratios to the first contender of each round."""
    rows: list[dict[str, float | str]] = []
    names = list(rounds[0])
    for name in names:
        seconds = [r[name].epoch_seconds for r in rounds]
        ratios = [r[name].epoch_seconds / r[names[0]].epoch_seconds for r in rounds]
        rows.append(
            {
                "contender": name,
                "epoch_seconds": statistics.median(seconds),
                "epoch_seconds_min": min(seconds),
                "epoch_seconds_max": max(seconds),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "wall_seconds": statistics.median(
                    [r[name].wall_seconds for r in rounds]
                ),
                "test_accuracy": statistics.median(
                    [r[name].test_accuracy for r in rounds]
                ),
            }
        )
    return rows


def show(rows: list[dict[str, float | str]], title: str) -> None:
    """The table, on stdout."""
    table = Table(title=title)
    heads = ("epoch [s]", "min-max", "ratio", "min-max", "whole [s]", "test")
    table.add_column("contender")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["contender"]),
            f"{row['epoch_seconds']:.2f}",
            f"{row['epoch_seconds_min']:.2f}-{row['epoch_seconds_max']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['wall_seconds']:.1f}",
            f"{row['test_accuracy']:.2%}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write all measurements as JSON")
    arguments = parser.parse_args()
    rounds = []
    for index in range(arguments.rounds):
        names = arguments.contenders
        rounds.append(
            {n: measure(n, arguments.recipe, arguments.epochs) for n in names}
        )
        print(f"round {index + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
    rows = summarise(rounds)
    show(rows, f"{arguments.recipe}, {arguments.rounds} rounds, {platform.machine()}")
    if arguments.save:
        raw = [{name: asdict(m) for name, m in r.items()} for r in rounds]
        record = {"machine": machine.describe(), "rows": rows, "rounds": raw}
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
