"""The accuracy of a recipe over several seeds.

    python benchmarks/seeds.py mnist-mlp --seeds 5

Any recipe field can be changed with --set, as in `samestep train`.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import cleanup

from samestep import Placement, Recipe, train
from samestep.config.recipe import parse_override
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    arguments = parser.parse_args()
    tests = []
    with ForkServer() as server, tempfile.TemporaryDirectory() as directory:
        for seed in range(arguments.seeds):
            overrides = {"seed": seed, **dict(map(parse_override, arguments.set))}
            placement = Placement(out=Path(directory) / str(seed))
            recipe = Recipe.load(arguments.recipe, overrides)
            run = train(recipe, placement, view=SilentView(), server=server)
            last, test = run.history[-1], run.result["test_accuracy"]
            tests.append(test)
            held_out = last.get("validation_accuracy")
            validation = "" if held_out is None else f"validation {held_out:.2%}  "
            train_accuracy = f"train {last['train_accuracy']:.2%}  "
            print(
                f"seed {seed}  {train_accuracy}{validation}test {test:.2%}", flush=True
            )
    print(
        f"test: mean {statistics.mean(tests):.2%}, {min(tests):.2%} to "
        f"{max(tests):.2%}, n={len(tests)}"
    )


if __name__ == "__main__":
    cleanup.run(main)
