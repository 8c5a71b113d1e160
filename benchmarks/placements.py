"""Trainings of a script of another library, at random placements, compared.

    python benchmarks/placements.py --script transformers --runs 40 --seed 0

A recipe is how many global batches a step accumulates, how many micro-batches each has,
and drawn options of the script. One process trains it undisturbed. Then it is trained
at drawn placements: number of processes, exchange, and how they end: undisturbed, one
killed, or all stopped, after which as many others as drawn go on. Weights, logs and
metrics must be the same at each; the first loss of a recipe that is `plain` must be
that of all its samples at once, in float64. Another seed draws others, so counts add
up. Exit code 1 if something differs.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cleanup


TESTS = Path(__file__).parents[1] / "tests"
DEADLINE = 1800.0
EACH = 4
"""Placements of a recipe, computed one after the other by one start of the script."""
ACCUMULATED, MICRO_BATCHES = (1, 2, 4), (6, 8, 12)
LARGEST_ERROR = 1e-6
"""Of a first loss, which is logged in float32."""


class Script(NamedTuple):
    """Takes `DIRECTORY PROCESSES [OPTION ...]`, and more of it after `--`.

    Options of all are `micro=COUNT`, `accumulate=COUNT`, `plain`, `exchange=NAME`,
    `kill=RANK:BATCH`, `stop=BATCH` and `resume`. It writes `sha256` and `lines.json` to
    the directory, and one process that is `plain` also `losses.json`.
    """

    path: Path
    options: tuple[str, ...]
    """What else belongs to the recipe."""
    batches: int
    """How many global batches all of them have at least."""
    endings: tuple[str, ...] = ("undisturbed", "kill={rank}:{batch}", "stop={batch}")


SCRIPTS = {
    "lightning": Script(
        TESTS / "lightning_script.py", ("", "plain", "float64", "float64 plain"), 12
    ),
    "gan": Script(TESTS / "lightning_script.py", ("gan", "gan float64"), 9),
    "transformers": Script(
        TESTS / "transformers_script.py",
        tuple(
            f"{kind} {plain}".strip()
            for kind in ("", "stream", "lora", "grouped", "labels", "smooth")
            for plain in ("", "plain")
        ),
        12,
        (*Script._field_defaults["endings"], "kill-saving={batch}"),
    ),
}


class Placed(NamedTuple):
    """Where and how one training is done."""

    processes: int = 1
    exchange: str = "shared"
    ending: str = "undisturbed"
    others: int = 1
    """Processes that go on."""
    others_exchange: str = "shared"

    def runs(self, directory: str, recipe: str) -> Iterator[str]:
        """Yield what the script is asked for."""
        begin = f"{directory} {self.processes} {recipe} exchange={self.exchange}"
        if self.ending == "undisturbed":
            yield begin
            return
        yield f"{begin} {self.ending}"
        yield (
            f"{directory} {self.others} {recipe} exchange={self.others_exchange} resume"
        )


class Found(NamedTuple):
    weights: str
    lines: object
    losses: tuple[float, float] | None
    """The first one, and what it must be."""


def drawn(numbers: random.Random, script: Script) -> Placed:
    processes, others = numbers.choices((1, 2, 3, 5), k=2)
    exchange, others_exchange = numbers.choices(("shared", "gloo"), k=2)
    ending = numbers.choice(script.endings).format(
        rank=numbers.randrange(processes), batch=numbers.randrange(1, script.batches)
    )
    return Placed(processes, exchange, ending, others, others_exchange)


def recipes(numbers: random.Random, name: str) -> Iterator[str]:
    """Yield all pairs in a drawn order, again and again, with drawn options."""
    accumulated = (1,) if name == "gan" else ACCUMULATED  # which does it itself
    pairs = list(product(accumulated, MICRO_BATCHES))
    while True:
        for count, micro in numbers.sample(pairs, len(pairs)):
            options = numbers.choice(SCRIPTS[name].options)
            yield f"accumulate={count} micro={micro} {options}".strip()


def train(script: Script, recipe: str, placements: list[Placed]) -> list[Found]:
    """Return what is found at each placement."""
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
        return [found(Path(home) / str(number)) for number in range(len(placements))]


def found(out: Path) -> Found:
    losses = out / "losses.json"
    return Found(
        (out / "sha256").read_text(),
        json.loads((out / "lines.json").read_text()),
        json.loads(losses.read_text()) if losses.exists() else None,
    )


def compare(recipe: str, placements: list[Placed], every: list[Found]) -> Counter[str]:
    """Print the recipe and each placement, and count. The first is undisturbed."""
    counts: Counter[str] = Counter()
    print(f"{recipe}: {every[0].weights}")
    if every[0].losses is not None:
        first, whole = every[0].losses
        counts["losses"] += 1
        counts["wrong"] += not abs(first - whole) <= LARGEST_ERROR
        print(f"  first loss {first}, in float64 {whole}")
    for placed, each in zip(placements[1:], every[1:], strict=True):
        differ = [
            name
            for name in ("weights", "lines")
            if getattr(each, name) != getattr(every[0], name)
        ]
        counts["differ"] += bool(differ)
        counts[placed.ending.partition("=")[0]] += 1
        said = f"{' and '.join(differ)} DIFFER" if differ else "same"
        print(f"  {placed}: {said}", flush=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, default="transformers")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    script, numbers = SCRIPTS[arguments.script], random.Random(arguments.seed)  # noqa: S311
    counts: Counter[str] = Counter()
    drawn_recipes = recipes(numbers, arguments.script)
    for first in range(0, arguments.runs, EACH):
        recipe, count = next(drawn_recipes), min(EACH, arguments.runs - first)
        placements = [Placed(), *(drawn(numbers, script) for _ in range(count))]
        counts += compare(recipe, placements, train(script, recipe, placements))
    print(
        f"n {arguments.runs}: {counts['kill'] + counts['kill-saving']} killed and "
        f"{counts['stop']} stopped, {counts['differ']} differ; {counts['losses']} "
        f"first losses, {counts['wrong']} wrong"
    )
    if counts["differ"] or counts["wrong"]:
        sys.exit(1)


if __name__ == "__main__":
    cleanup.run(main)
