"""What a loop gains by sending gradients while they are computed; as root.

    python benchmarks/overlap.py --bandwidth 1gbit --width 1024 --batch 64

Two hosts (`hosts.py`), one worker each, with a link of so many bits per second in each
direction, train one network on random samples: in a `samestep.Loop` whose gradients
leave during the backward pass (`early`) or after it (`after`), and with
DistributedDataParallel (`ddp`). Rounds of ten steps of each take turns in the same
processes. Prints medians of rank 0's milliseconds per step, and of the ratios within a
round, with quartiles.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from subprocess import PIPE

import cleanup
import torch
import torch.distributed as dist
from hosts import Network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samestep
from samestep.loop.overlap import OverlappingGloo
from samestep.system import machine


PORT = 29_500
STEPS, INPUTS, CLASSES = 10, 784, 10
MICRO_BATCHES = 2  # what DDP computes
WAYS = "early", "after", "ddp"


measure = nn.CrossEntropyLoss()


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for size in (INPUTS, width, width):
        layers += [nn.Linear(size, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def looped(
    width: int, data: list[tuple[Tensor, Tensor]]
) -> dict[str, Callable[[], None]]:
    """Return how to train for STEPS steps: `early` and `after`."""
    model = network(width)
    loop = samestep.Loop(
        model, micro_batches=MICRO_BATCHES, exchange="gloo", balance="off"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    exchange = loop._engine.exchange
    assert isinstance(exchange, OverlappingGloo)
    has_buckets = exchange._is_early

    def train(is_early: bool) -> None:
        exchange._is_early = is_early and has_buckets
        for step in loop.steps(data, len(data) // STEPS, epoch=0):
            for inputs, targets in step:
                measure(model(inputs), targets).backward()
            optimizer.step()

    return {"early": lambda: train(True), "after": lambda: train(False)}


def distributed(
    width: int, data: list[tuple[Tensor, Tensor]], rank: int
) -> Callable[[], None]:
    """Return how to train for STEPS steps with DDP."""
    model = DistributedDataParallel(network(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.stack([sample for sample, _ in data[rank::2]])
    targets = torch.stack([target for _, target in data[rank::2]])
    half = len(inputs) // STEPS

    def train() -> None:
        for first in range(0, STEPS * half, half):
            part = slice(first, first + half)
            optimizer.zero_grad()
            measure(model(inputs[part]), targets[part]).backward()
            optimizer.step()

    return train


def worker(rank: int, width: int, rounds: int, batch: int) -> None:
    """Print the seconds of a step of each round, by what was timed."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://10.0.0.1:{PORT}", rank=rank, world_size=2
    )
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(STEPS * batch, INPUTS, generator=random)
    targets = torch.randint(CLASSES, (STEPS * batch,), generator=random)
    data = list(zip(inputs, targets, strict=True))
    ways = looped(width, data) | {"ddp": distributed(width, data, rank)}
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + rounds):
        for way in WAYS:
            dist.barrier()
            began = time.perf_counter()
            ways[way]()
            found[way].append((time.perf_counter() - began) / STEPS)
    print(json.dumps({way: seconds[1:] for way, seconds in found.items()}))


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(*map(int, sys.argv[2:6]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="of all workers")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    with Network(bandwidth=given.bandwidth) as hosts:
        started = []
        for rank, host in enumerate([hosts.add(), hosts.add()]):
            options = map(str, (rank, given.width, given.rounds, given.batch))
            command = ["env", "GLOO_SOCKET_IFNAME=eth0", "WORLD_SIZE=2", sys.executable]
            command += [__file__, "--worker", *options]
            started.append(host.start(command, stdout=PIPE, text=True))
        printed, _ = [process.communicate(timeout=600)[0] for process in started]
    found: dict[str, list[float]] = json.loads(printed)
    print(f"{machine.describe()['processor']}, {given.bandwidth}, n={given.rounds}")
    for way in WAYS:
        print(f"{way:6} {spread([1e3 * seconds for seconds in found[way]])} ms")
    for way in WAYS[1:]:
        ratios = [b / a for a, b in zip(found["early"], found[way], strict=True)]
        print(f"{way} / early {spread(ratios)}")
    return None


if __name__ == "__main__":
    cleanup.run(main)
