"""Trainings whose fingerprints are kept in golden.json; this script writes it anew.

    python tests/golden.py

That is for a new version of the specification of portable arithmetic.
"""

import json
import tempfile
from pathlib import Path

from test_portable import KINDS, recipe_of

from samestep import Placement, Recipe, Run, train
from samestep.kernels.interface import ARITHMETIC
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


FILE = Path(__file__).with_name("golden.json")
LARGE = {
    "mnist-mlp": Recipe.load("mnist-mlp"),
    "mnist-mlp-classic": Recipe.load("mnist-mlp-classic", {"epochs": 1}),
}
"""What `samestep train` does, and one epoch of the other."""
SMALL = {kind: recipe_of(kind).changed({"data.train_samples": 300}) for kind in KINDS}


def outcome(run: Run) -> dict[str, str | float]:
    """Return what is kept of a run."""
    return {name: run.result[name] for name in ("weights_sha256", "test_loss")}


def main() -> None:
    """Train all of them and write the file."""
    outcomes = {}
    with ForkServer() as server, tempfile.TemporaryDirectory() as directory:
        for name, recipe in (LARGE | SMALL).items():
            where = Placement(workers=2, out=Path(directory) / name)
            run = train(recipe, where, view=SilentView(), server=server)
            outcomes[name] = outcome(run)
            print(f"{run.weights_sha256}  {name}", flush=True)
    kept = {"arithmetic": ARITHMETIC, "outcomes": outcomes}
    FILE.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
