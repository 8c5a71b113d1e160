"""Trainings whose fingerprints are kept in golden.json; this script writes it anew.

    python tests/golden.py

That is for a new version of the specification of portable arithmetic.

    python tests/golden.py --published

writes the published fingerprints of built-in recipes that are new or have changed.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from test_portable import KINDS, recipe_of

from samestep import Placement, Recipe, Run, train
from samestep.config import published
from samestep.config.recipe import BUILT_IN, built_in_recipes
from samestep.kernels.interface import ARITHMETIC
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


FILE = Path(__file__).with_name("golden.json")
PUBLISHED = BUILT_IN.joinpath(published.FILE)
LARGE = {
    "mnist-mlp": Recipe.load("mnist-mlp"),
    "mnist-mlp-classic": Recipe.load("mnist-mlp-classic", {"epochs": 1}),
}
"""What `samestep train` does, and one epoch of the other."""
SMALL = {
    kind: recipe_of(kind).changed(
        {"data.train_samples": 300} if "data" not in more else {}
    )
    for kind, more in KINDS.items()
}


def outcome(run: Run) -> dict[str, str | float]:
    """Return what is kept of a run."""
    return {name: run.result[name] for name in ("weights_sha256", "test_loss")}


def main() -> None:
    """Train all of them and write the file."""
    outcomes = {name: outcome(run) for name, run in _runs(LARGE | SMALL)}
    kept = {"arithmetic": ARITHMETIC, "outcomes": outcomes}
    FILE.write_text(json.dumps(kept, indent=2) + "\n")


def publish() -> None:
    """Train the built-in recipes that are not as published, and write the file."""
    path = Path(str(PUBLISHED))
    before = json.loads(path.read_text())
    known = before["recipes"] if before["arithmetic"] == ARITHMETIC else {}
    recipes = {name: Recipe.load(name) for name in built_in_recipes()}
    digests = {n: r.digest for n, r in recipes.items() if published.is_published(r)}
    kept = {
        name: entry
        for name, entry in known.items()
        if entry["recipe_sha256"] == digests.get(name)
    }
    missing = {name: recipes[name] for name in digests.keys() - kept.keys()}
    for name, run in _runs(missing):
        entry = {"recipe_sha256": digests[name], "weights_sha256": run.weights_sha256}
        kept[name] = entry
    content = {"arithmetic": ARITHMETIC, "recipes": dict(sorted(kept.items()))}
    path.write_text(json.dumps(content, indent=2) + "\n")


def _runs(recipes: dict[str, Recipe]) -> Iterator[tuple[str, Run]]:
    with ForkServer() as server, tempfile.TemporaryDirectory() as directory:
        for name, recipe in recipes.items():
            where = Placement(workers=2, out=Path(directory) / name)
            run = train(recipe, where, view=SilentView(), server=server)
            print(f"{run.weights_sha256}  {name}", flush=True)
            yield name, run


if __name__ == "__main__":
    publish() if "--published" in sys.argv else main()
