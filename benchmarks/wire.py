"""How close the exchange between machines comes to what its bytes need; as root.

    python benchmarks/wire.py --bandwidth 1gbit 2 3 4

Hosts with one worker each (`hosts.py`) sum gradients of mnist-mlp, again and again,
each with one micro-batch of its own or so many as said. A link of so many bits per
second carries in each direction what a host sends and receives; what that would take at
the least is compared with what an exchange takes, the median over rounds of ten.
"""

import argparse
import json
import statistics
import sys
import time
from subprocess import PIPE

import torch
from hosts import Network

from samestep import barrier, dataset, models
from samestep.balance import shares
from samestep.exchange.connecting import Connection, tcp_store
from samestep.exchange.nodes import NodesExchange
from samestep.flat import Flat
from samestep.place import Place
from samestep.recipe import Recipe
from samestep.rounding import Rounding


PORT = 29_500
ROUNDS, EXCHANGES = 15, 10


def worker(node: int, nodes: int, micro_batches: int, compression: str) -> None:
    """The only one of its host: prints what an exchange takes, and its bytes."""
    torch.set_num_threads(1)
    recipe = Recipe.load("mnist-mlp")
    flat = Flat(models.build(recipe.model, dataset.load(recipe.data)))
    place = Place(node, nodes, 0, 1, "10.0.0.1", PORT, node, nodes)
    connection = Connection(
        exchange="shared",
        place=place,
        timeout_seconds=60.0,
        start_seconds=60.0,
        spin_seconds=1e-3,
        rounding=Rounding.of(compression),
        memory=barrier.create(1),
        store=lambda: tcp_store(place, None, 60.0),
    )
    exchange = connection(flat, shares(micro_batches, nodes))
    assert isinstance(exchange, NodesExchange)
    taken = []
    for _ in range(ROUNDS):
        exchange.merge(torch.zeros(1, dtype=torch.float64))
        began = time.perf_counter()
        for _ in range(EXCHANGES):
            exchange.sum()
        taken.append((time.perf_counter() - began) / EXCHANGES)
    sent = exchange.network_bytes_per_step / nodes
    print(json.dumps({"seconds": statistics.median(taken), "bytes": sent}))


def measure(nodes: int, micro_batches: int, compression: str, rate: str) -> None:
    """Prints one line."""
    with Network(bandwidth=rate) as network:
        hosts = [network.add() for _ in range(nodes)]
        processes = []
        for node, host in enumerate(hosts):
            options = map(str, (node, nodes, micro_batches, compression))
            command = ["env", "GLOO_SOCKET_IFNAME=eth0", sys.executable, __file__]
            command += ["--worker", *options]
            processes.append(host.start(command, stdout=PIPE, text=True))
        printed = [process.communicate(timeout=120)[0] for process in processes]
    found = [json.loads(line) for line in printed]
    seconds = statistics.median(one["seconds"] for one in found)
    sent: float = found[0]["bytes"]
    least = 8 * sent / bits_per_second(rate)
    print(
        f"{nodes} hosts  {micro_batches} micro-batches  {compression:4}  "
        f"{sent / 1e6:6.3f} MB a host  {1e3 * seconds:6.2f} ms, at least "
        f"{1e3 * least:6.2f}: {seconds / least:.3f}"
    )


def bits_per_second(rate: str) -> float:
    """`1gbit`, as `tc` writes it."""
    units = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
    return float(rate[:-4]) * units[rate[-4:]]


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        node, nodes, micro_batches = map(int, sys.argv[2:5])
        return worker(node, nodes, micro_batches, sys.argv[5])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hosts", type=int, nargs="+")
    parser.add_argument("--bandwidth", default="1gbit")
    parser.add_argument("--micro-batches", type=int)
    parser.add_argument("--compression", default="none")
    given = parser.parse_args()
    for nodes in given.hosts:
        leaves = given.micro_batches or nodes
        measure(nodes, leaves, given.compression, given.bandwidth)
    return None


if __name__ == "__main__":
    main()
