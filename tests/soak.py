"""The workers of the soak test: `python soak.py WORKERS FD STEPS SEED MICRO_BATCHES`.

Every step exchanges gradients that everyone can compute, and checks their sum and the
parameters; with an even number of micro-batches the whole sum, as in a loop. Random
delays hit random workers. Each prints the number of steps.
"""

import multiprocessing
import os
import random
import sys
import time

import torch
from torch import nn

from samestep.core import tree
from samestep.core.ownership import shares
from samestep.core.topology import Topology
from samestep.exchange.shared import SharedExchange
from samestep.state.flat import Flat
from samestep.system.barrier import Waits


def gradients(flat: Flat, step: int, micro_batches: int) -> list[torch.Tensor]:
    """One vector for each micro-batch; zero in the padding, as the real ones are."""
    generator = torch.Generator().manual_seed(step)
    made = []
    for _ in range(micro_batches):
        vector = torch.zeros(flat.size)
        for view in flat.views(vector):
            view.copy_(torch.randn(view.shape, generator=generator))
        made.append(vector)
    return made


def main(
    rank: int, workers: int, fd: int, steps: int, seed: int, micro_batches: int
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chance = random.Random(seed * workers + rank)
    model = nn.Linear(61, 40)
    flat, owned = Flat(model), shares(micro_batches, workers)
    topology = Topology.on_one_node(rank, workers)
    exchange = SharedExchange(flat, owned, topology, fd, Waits(20e-6, 30.0))
    exchange.attach(model)
    expected = exchange.parameters.clone()
    for step in range(steps):
        vectors = gradients(flat, step, micro_batches)
        for leaf in range(*owned[rank]):
            with exchange.accumulate(leaf):
                pairs = zip(flat.parameters, flat.views(vectors[leaf]), strict=True)
                loss = torch.stack([(p * view).sum() for p, view in pairs]).sum()
                torch.autograd.backward(loss)
            if chance.random() < 0.01:
                time.sleep(chance.random() * 2e-3)
            exchange.after_backward(leaf)
        total = tree.reduce(
            micro_batches, {(m, m + 1): v for m, v in enumerate(vectors)}, torch.add
        )
        if micro_batches % 2 == 0:
            whole, _ = exchange.whole_sum()
            wanted = flat.views(total)
            assert all(map(torch.equal, whole, wanted)), f"wrong sum at step {step}"
            continue
        gradient, _ = exchange.sum()
        part = slice(*exchange.owned)
        assert gradient.equal(total[part]), f"wrong sum at step {step}"
        exchange.parameters[part] -= 0.01 * gradient
        if chance.random() < 0.01:
            time.sleep(chance.random() * 2e-3)
        exchange.all_gather_parameters()
        expected -= 0.01 * total
        assert exchange.parameters.equal(expected), f"wrong parameters at step {step}"
    os.write(1, f"{steps}\n".encode())  # whole, beside those of the others


def fork(workers: int, *arguments: int) -> None:
    """Run all workers, which share one import of torch; raise if one fails."""
    context = multiprocessing.get_context("fork")
    crew = [
        context.Process(target=main, args=(rank, workers, *arguments))
        for rank in range(workers)
    ]
    for worker in crew:
        worker.start()
    for worker in crew:
        worker.join()
    assert all(worker.exitcode == 0 for worker in crew)


if __name__ == "__main__":
    fork(*map(int, sys.argv[1:]))
