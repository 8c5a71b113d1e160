"""How close the exchange between machines comes to what its bytes need; as root.

    python benchmarks/wire.py --bandwidth 1gbit 2 3 4

Hosts with one worker each (`hosts.py`) sum gradients of mnist-mlp, again and again,
each with one micro-batch of its own or so many as said. A link of so many bits per
second carries in each direction what a host sends and receives; what that would take at
the least is compared with what an exchange takes: the median and the range over rounds
of ten on all hosts.
"""

import argparse
import json
import statistics
import sys
import time
from subprocess import PIPE

import cleanup
import torch
from hosts import Network

from samestep import models
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.core.ownership import shares
from samestep.core.topology import Topology
from samestep.data import dataset
from samestep.exchange.compression import Compression
from samestep.exchange.factory import Connection, tcp_store
from samestep.exchange.hierarchical import NodesExchange
from samestep.state.flat import Flat
from samestep.supervisor.job import make_setup
from samestep.system import barrier


PORT = 29_500
EXCHANGES = 10


def worker(
    node: int, nodes: int, micro_batches: int, rounds: int, compression: str
) -> None:
    """Print an exchange's seconds and bytes, as the only worker of its host."""
    torch.set_num_threads(1)
    recipe = Recipe.load("mnist-mlp")
    flat = Flat(models.build(recipe.model, dataset.load(recipe.data)))
    place = Topology(node, nodes, 0, 1, "10.0.0.1", PORT, node, nodes)
    connection = Connection(
        setup=make_setup(recipe, Placement(workers=1, exchange="shared")),
        topology=place,
        compression=Compression.of(compression),
        memory=barrier.create(1),
        store=lambda: tcp_store(place, None, 60.0),
    )
    exchange = connection(flat, shares(micro_batches, nodes))
    assert isinstance(exchange, NodesExchange)
    taken = []
    for _ in range(rounds):
        exchange.merge(torch.zeros(1, dtype=torch.float64))
        began = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange.sum()
        taken.append((time.perf_counter() - began) / EXCHANGES)
    sent = exchange.network_bytes_per_step / nodes
    print(json.dumps({"seconds": taken, "bytes": sent}))


def measure(nodes: int, micro_batches: int, given: argparse.Namespace) -> None:
    """Print one line."""
    with Network(bandwidth=given.bandwidth) as network:
        hosts = [network.add() for _ in range(nodes)]
        processes = []
        for node, host in enumerate(hosts):
            options = map(str, (node, nodes, micro_batches, given.rounds))
            command = ["env", "GLOO_SOCKET_IFNAME=eth0", sys.executable, __file__]
            command += ["--worker", *options, given.compression]
            processes.append(host.start(command, stdout=PIPE, text=True))
        printed = [process.communicate(timeout=120)[0] for process in processes]
    found = [json.loads(line) for line in printed]
    taken: list[float] = [seconds for one in found for seconds in one["seconds"]]
    seconds, sent = statistics.median(taken), float(found[0]["bytes"])
    least = 8 * sent / bits_per_second(given.bandwidth)
    print(
        f"{nodes} hosts  {micro_batches} micro-batches  {given.compression:4}  "
        f"{sent / 1e6:6.3f} MB a host  {1e3 * seconds:6.2f} ms "
        f"({1e3 * min(taken):.2f}-{1e3 * max(taken):.2f}, n={given.rounds}), at least "
        f"{1e3 * least:6.2f}: {seconds / least:.3f}"
    )


def bits_per_second(rate: str) -> float:
    """`1gbit`, as `tc` writes it."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    return float(rate[:-4]) * units[rate[-4:]]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        node, nodes, micro_batches, rounds = map(int, sys.argv[2:6])
        return worker(node, nodes, micro_batches, rounds, sys.argv[6])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", type=int, nargs="+")
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compression", default="none")
    given = parser.parse_args()
    for nodes in given.hosts:
        measure(nodes, given.micro_batches or nodes, given)
    return None


if __name__ == "__main__":
    cleanup.run(main)
