"""What the ledger costs: steps with and without the hashes, in turn.

    python benchmarks/ledger.py
    python benchmarks/ledger.py mnist-cnn --set arithmetic=torch
    python benchmarks/ledger.py --micro-batches
    python benchmarks/ledger.py --workers 2

Workers take steps of the recipe in blocks, alternately with the hashes of gradient and
parameters and without. Each pair of blocks, of which the first one changes with every
pair, gives a ratio. Everything but the hashes is the same; writing the file, 24 bytes
per step, is left out of both. With `--micro-batches` the steps with these hashes, too,
are compared with those that have only hashes of steps.
"""

import argparse
import os

import cleanup
import numpy as np
import torch
from phases import Memory, block, built

from samestep.config.recipe import Recipe, parse_override
from samestep.core.topology import Topology


def forked(workers: int) -> tuple[int, list[int]]:
    """Fork the other workers; return the own rank, and to rank 0 their processes."""
    others = []
    for rank in range(1, workers):
        if (pid := os.fork()) == 0:
            return rank, []
        others.append(pid)
    return 0, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="mnist-mlp")
    parser.add_argument("--set", dest="assignments", action="append", default=[])
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--steps", type=int, default=100, help="of a block")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--micro-batches", action="store_true")
    options = parser.parse_args()
    recipe = Recipe.load(options.recipe, dict(map(parse_override, options.assignments)))
    torch.set_num_threads(1)
    torch.set_flush_denormal(not recipe.is_portable)
    finer = bool(options.micro_batches)
    memories = [Memory.of(options.workers) for _ in range(2)]
    rank, others = forked(options.workers)
    topology = Topology.on_one_node(rank, options.workers)
    trainers = {
        "with": built(recipe, topology, memories[0], micro_batches=finer),
        "without": built(recipe, topology, memories[1], is_hashed=finer),
    }
    ratios, fastest = [], dict.fromkeys(trainers, float("inf"))
    for pair in range(-1, options.pairs):  # the first pair warms up
        seconds = {}
        for name in list(trainers)[:: 1 if pair % 2 else -1]:
            start = (pair + 1) * options.steps
            seconds[name] = block(trainers[name], start, options.steps)
        if pair >= 0:
            ratios.append(seconds["with"] / seconds["without"])
            fastest = {name: min(fastest[name], seconds[name]) for name in trainers}
    if rank > 0:
        os._exit(0)
    for other in others:
        os.waitpid(other, 0)
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    best = ", ".join(
        f"{1e3 * time / options.steps:.3f} ms {name}" for name, time in fastest.items()
    )
    print(
        f"{recipe.name}, {recipe.arithmetic}: with/without median {middle:.4f}, "
        f"quartiles {low:.4f} to {high:.4f}, n={options.pairs} pairs of "
        f"{options.steps} steps; fastest step {best}"
    )


if __name__ == "__main__":
    cleanup.run(main)
