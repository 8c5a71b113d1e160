"""Trainings of a script of another library, at random placements, compared.

    python benchmarks/placements.py --script transformers --runs 20 --seed 0

Each recipe is drawn: micro-batches, and options of the script. It is trained at drawn
placements: number of processes, exchange, and whether a process is killed, after which
as many others go on. Its weights and lines must be the same at each. Exit code 1 if
they are not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cleanup


TESTS = Path(__file__).parents[1] / "tests"
DEADLINE = 1800.0
EACH = 4
"""Placements of a recipe, computed one after the other by one start of the script."""


class Script(NamedTuple):
    """Takes `DIRECTORY PROCESSES [OPTION ...]`, and more of it after `--`.

    Options of all are `micro=COUNT`, `exchange=NAME`, `kill=RANK:STEP` and `resume`. It
    writes `sha256` and `lines.json` to the directory.
    """

    path: Path
    recipes: tuple[str, ...]
    """Options that belong to the recipe."""
    steps: int
    """How many steps all of them have at least."""


SCRIPTS = {
    "lightning": Script(
        TESTS / "lightning_script.py",
        ("", "accumulate=2", "accumulate=4", "float64", "gan", "gan float64"),
        9,
    ),
    "transformers": Script(
        TESTS / "transformers_script.py",
        ("", "accumulate", "stream", "lora", "grouped", "labels", "accumulate smooth"),
        9,
    ),
}


class Placed(NamedTuple):
    """Where and how one training is done."""

    processes: int
    exchange: str
    kill: str | None
    resumed_by: int

    def runs(self, directory: str, recipe: str) -> Iterator[str]:
        """Return what the script is asked for."""
        common = f"{recipe} exchange={self.exchange}"
        killed = f" kill={self.kill}" if self.kill else ""
        yield f"{directory} {self.processes} {common}{killed}"
        if self.kill:
            yield f"{directory} {self.resumed_by} {common} resume"


def drawn(numbers: random.Random, steps: int) -> Placed:
    processes, resumed_by = numbers.choices((1, 2, 3, 5), k=2)
    # The first checkpoint must be there.
    kill = f"{numbers.randrange(processes)}:{numbers.randrange(steps // 2, steps)}"
    exchange = numbers.choice(("shared", "gloo"))
    return Placed(processes, exchange, numbers.choice((kill, None)), resumed_by)


def train(script: Script, recipe: str, placements: list[Placed]) -> list[Any]:
    """Return weights and lines at each placement."""
    with tempfile.TemporaryDirectory() as home:
        runs = [
            run
            for number, placed in enumerate(placements)
            for run in placed.runs(f"{home}/{number}", recipe)
        ]
        words = " -- ".join(runs).split()
        ended = subprocess.run(
            [sys.executable, script.path, *words],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        if ended.returncode:
            sys.exit(f"{' '.join(words)}\n{ended.stderr}")
        found = [Path(home) / str(number) for number in range(len(placements))]
        return [
            ((out / "sha256").read_text(), json.loads((out / "lines.json").read_text()))
            for out in found
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, default="transformers")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    script, numbers = SCRIPTS[arguments.script], random.Random(arguments.seed)  # noqa: S311
    differ = killed = 0
    for first in range(0, arguments.runs, EACH):
        micro = numbers.choice((5, 6, 8))
        recipe = f"micro={micro} {numbers.choice(script.recipes)}".strip()
        last = min(first + EACH, arguments.runs)
        placements = [drawn(numbers, script.steps) for _ in range(first, last)]
        found = train(script, recipe, placements)
        killed += sum(placed.kill is not None for placed in placements)
        for placed, (weights, lines) in zip(placements, found, strict=True):
            is_same = (weights, lines) == found[0]
            differ += not is_same
            end = f"{weights[:12]} {'same' if is_same else 'DIFFERS'}"
            print(f"{recipe}: {placed} {end}", flush=True)
    print(f"n {arguments.runs}, {killed} killed and resumed, {differ} differ")
    if differ:
        sys.exit(1)


if __name__ == "__main__":
    cleanup.run(main)
