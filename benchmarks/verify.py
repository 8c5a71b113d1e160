"""Verified steps (`--verify`): what they cost, and what they find.

    python benchmarks/verify.py
    python benchmarks/verify.py cost --set arithmetic=torch
    python benchmarks/verify.py found

`cost`: a round trains the same recipe with each share in turn, in an order that
changes; the cost is the ratio of training seconds to those without, minus one. It fails
if a clean training has a false alarm or other weights. `found`: a bit of worker 1's
gradients is inverted in every step; how many of them are found, and whether that worker
is named. Before, every step of a clean training is verified: are there false alarms?
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import cleanup
import numpy as np

import samestep
from samestep import Placement, Recipe, Run
from samestep.config.recipe import parse_override
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.fault_injection import SCHEDULE


def train(
    server: ForkServer, recipe: Recipe, workers: int, share: float, seconds: float = 0.5
) -> Run:
    """Train with this share of verified steps; `seconds` between two snapshots."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "run"
        placement = Placement(
            workers=workers, verify=share, out=out, snapshot_seconds=seconds
        )
        return samestep.train(recipe, placement, view=SilentView(), server=server)


def cost(server: ForkServer, recipe: Recipe, workers: int, rounds: int) -> None:
    shares = (0.0, 0.01, 0.05, 1.0)
    ratios: dict[float, list[float]] = {share: [] for share in shares[1:]}
    results = set()
    for index in range(-1, rounds):  # the first round warms up
        seconds = {}
        for place in range(len(shares)):
            share = shares[(index + place) % len(shares)]
            run = train(server, recipe, workers, share)
            seconds[share] = run.result["train_seconds"]
            results.add(run.weights_sha256)
            if run.result["wrong_workers"] or run.result["restarts"]:
                raise SystemExit(f"a false alarm: {run.result['wrong_workers']}")
        for share in shares[1:] if index >= 0 else ():
            ratios[share].append(seconds[share] / seconds[0.0] - 1)
    if len(results) > 1:
        raise SystemExit(f"verified steps change the weights: {results}")
    steps = run.history[-1]["step"]
    for share, found in ratios.items():
        low, middle, high = np.quantile(found, (0.25, 0.5, 0.75))
        print(
            f"{recipe.name}, {recipe.arithmetic}, {workers} workers, {share:.0%} of "
            f"{steps} steps verified: cost median {middle:.2%}, quartiles {low:.2%} to "
            f"{high:.2%}, n={rounds}"
        )


def find(server: ForkServer, recipe: Recipe, workers: int, share: float) -> None:
    clean = train(server, recipe, workers, 1.0)
    steps = clean.history[-1]["step"]
    print(f"clean: {len(clean.result['wrong_workers'])} false alarms, n={steps} steps")
    flip = {"kind": "flip", "point": "exchange", "rank": 1}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as schedule:
        json.dump([flip | {"number": n, "step": n} for n in range(steps)], schedule)
        schedule.flush()
        os.environ[SCHEDULE] = schedule.name
        # After every step: one that was wrong and not found is not to be repeated.
        run = train(server, recipe, workers, share, seconds=1e-9)
        del os.environ[SCHEDULE]
    named = run.result["wrong_workers"]
    right = sum(each["worker"] == 1 for each in named)
    print(
        f"{recipe.name}, {recipe.arithmetic}, {workers} workers, {share:.0%} verified: "
        f"of {steps} wrong bits {len(named)} found ({len(named) / steps:.1%}), the "
        f"worker named rightly in {right}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("cost", "found"), default="cost")
    parser.add_argument("--recipe", default="mnist-mlp")
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--share", type=float, default=0.05, help="of `found`")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe, dict(map(parse_override, options.assignments)))
    with ForkServer() as server:
        if options.what == "cost":
            cost(server, recipe, options.workers, options.rounds)
        else:
            find(server, recipe, options.workers, options.share)


if __name__ == "__main__":
    cleanup.run(main)
