r"""The time to an accuracy: from the shell to a tested model on disk.

    python benchmarks/records.py --save records.json
    python benchmarks/records.py mnist-98 --seeds 5

Rules:

- The timer contains a whole process, `samestep train RECIPE`, from its exec to its
  exit: the imports, reading the data, all epochs, the test on all test samples, writing
  the model. It leaves out `report.html`, and what is done once for a machine: compiling
  the kernels, unpacking the data, reading files into the page cache. One run that is
  not counted does these before.
- A recipe is fixed before: a number of epochs, no early stopping, nothing that depends
  on a result. The test samples are read once, at the end.
- Recipes were chosen by their accuracy on held-out training samples. In a record they
  train with seeds that no choice has seen, from 200 on, and hold nothing out.
- Every seed counts. Success is the share of seeds whose test accuracy is at least the
  bound; failures stay in the times.
- Two workers, on two cores, and nothing else runs. Records take turns, and beside them
  `import torch`, a process of its own, is the floor.

Recipes are in `benchmarks/records`; docs/log.md says how they were chosen. The data of
Fashion-MNIST are those of Debian's package `dataset-fashion-mnist`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import cleanup
import numpy as np
from rich.console import Console
from rich.table import Table

from samestep import Recipe, Run
from samestep.system import machine


RECIPES = Path(__file__).parent / "records"
BOUNDS = {"mnist-98": 0.98, "mnist-99": 0.99, "fashion-91.5": 0.915}
FLOOR = "import torch"
FIRST_SEED = 200
"""Recipes were chosen with smaller ones."""


@dataclass(frozen=True)
class Attempt:
    """One process: its seed, its seconds, and the accuracy that it reached."""

    seed: int
    seconds: float
    test_accuracy: float


def timed(*arguments: str) -> float:
    """Run Python in a process of its own; return the seconds from exec to exit."""
    start = time.perf_counter()
    ended = subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{ended.stderr}")
    return seconds


def attempt(name: str, seed: int) -> Attempt:
    """Train a record's recipe once."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        command = ["-m", "samestep", "train", str(RECIPES / f"{name}.toml")]
        command += ["--workers", "2", "--seed", str(seed), "--out", str(out)]
        seconds = timed(*command, "--no-report", "--no-tensorboard")
        return Attempt(seed, seconds, Run.open(out).result["test_accuracy"])


def check_rules(name: str) -> None:
    """Raise SystemExit if a recipe chooses by results, or by other data than all."""
    recipe = Recipe.load(RECIPES / f"{name}.toml")
    if recipe.early_stopping is not None or recipe.to_dict()["data"]["validation"]:
        raise SystemExit(
            "A record has a fixed number of epochs and holds nothing out: remove "
            f"`early_stopping`, and set `data.validation` to 0, in {name}.toml."
        )


def summarise(name: str, attempts: list[Attempt]) -> dict[str, float | str]:
    """Return quartiles of the seconds, mean and least accuracy, and success."""
    accuracies = [each.test_accuracy for each in attempts]
    lower, median, upper = np.quantile([a.seconds for a in attempts], [0.25, 0.5, 0.75])
    return {
        "record": name,
        "bound": BOUNDS[name],
        "seconds": float(median),
        "seconds_lower_quartile": float(lower),
        "seconds_upper_quartile": float(upper),
        "success": statistics.mean(float(a >= BOUNDS[name]) for a in accuracies),
        "test_accuracy": statistics.mean(accuracies),
        "test_accuracy_min": min(accuracies),
    }


def show(rows: list[dict[str, float | str]], floor: float, seeds: int) -> None:
    """Print the table."""
    table = Table(title=f"From the shell, n = {seeds} seeds; {FLOOR}: {floor:.2f} s")
    table.add_column("record")
    for head in ("seconds", "quartiles", "success", "test, mean", "lowest"):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["record"]),
            f"{row['seconds']:.2f}",
            f"{row['seconds_lower_quartile']:.2f}-{row['seconds_upper_quartile']:.2f}",
            f"{row['success']:.0%}",
            f"{row['test_accuracy']:.2%}",
            f"{row['test_accuracy_min']:.2%}",
        )
    Console(width=88).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "records", nargs="*", metavar="RECORD", help=f"of {', '.join(BOUNDS)}"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--save", type=Path, help="all measurements, as JSON")
    arguments = parser.parse_args()
    names = arguments.records or list(BOUNDS)
    if wrong := set(names) - BOUNDS.keys():
        parser.error(f"records are {', '.join(BOUNDS)}; received {wrong}")
    for name in names:
        check_rules(name)
        attempt(name, FIRST_SEED)
    floors: list[float] = []
    attempts: dict[str, list[Attempt]] = {name: [] for name in names}
    for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
        floors.append(timed("-c", FLOOR))
        for name in names:
            attempts[name].append(attempt(name, seed))
            print(name, attempts[name][-1], file=sys.stderr, flush=True)
    rows = [summarise(name, of_name) for name, of_name in attempts.items()]
    floor = statistics.median(floors)
    show(rows, floor, arguments.seeds)
    if arguments.save:
        runs = {name: list(map(asdict, each)) for name, each in attempts.items()}
        record = {"machine": machine.describe(), "floor_seconds": floor, "rows": rows}
        arguments.save.write_text(json.dumps(record | {"runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    cleanup.run(main)
