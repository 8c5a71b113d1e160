"""Hosts with networks of their own: whatever happens to them, the same bits.

Every training here is one of several machines that torchrun starts; the hosts, their
switch and what is cut are real (`benchmarks/hosts.py`).
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from agents import SLOW, Machine, assert_same, hurry, wait_for
from hosts import Host, Network, why_not
from own_samples import EVERYTHING, HEAD

import samestep
from samestep import Placement, Recipe, Run
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


pytestmark = [
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.timeout(600),
]

LOOPBACK = ("0100007F", "00000000000000000000000001000000")
PORT = 29400
RECIPE: dict[str, Any] = {
    "name": "own",
    "epochs": 60,
    "global_batch": 24,
    "micro_batches": 6,
    "optimizer": {"name": "adam", "lr": 0.01},
    "data": {"source": "custom", "load": "mine_hosts:load"},
    "model": {"family": "custom", "build": "mine_hosts:build"},
    "loss": {"name": "custom", "function": "mine_hosts:loss"},
}
SOON = ("--hang-timeout", "5")


class Node(Machine):
    """One host's part of the training."""

    def __init__(self, host: Host, process: Any, out: Path, log: Path) -> None:
        super().__init__(process, out, log)
        self.host = host

    def kill(self) -> None:
        """Kill everything that runs there."""
        self.host.kill()


Start = Callable[..., Node]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Run:
    """A training on one machine, with which all others are compared.

    3 steps in an epoch; one worker needs 3 minutes for it, until `hurry`.
    """
    directory = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        hurry()
        slow = SLOW.format(hurry=directory / "hurry", seconds=0.16)
        Path("mine_hosts.py").write_text(HEAD + EVERYTHING + slow)
        recipe = Recipe.from_dict(RECIPE)
        where = Placement(workers=1, out=directory / "run")
        return samestep.train(recipe, where, view=SilentView(), server=server)


@pytest.fixture
def recipe(whole: Run, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """That of `whole`, in its directory."""
    monkeypatch.chdir(whole.path.parent)
    Path("hurry").unlink(missing_ok=True)  # a skipped test has not made it again
    return whole.recipe


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(bandwidth="1gbit") as made:
        yield made


@pytest.fixture
def start(tmp_path: Path, network: Network) -> Iterator[Start]:
    """`start(recipe, endpoint, *arguments, ...)`: the command on one more host.

    `endpoint` is another node, where they meet, or None: this one.
    """
    with ExitStack() as stack:

        def run(
            recipe: Recipe,
            endpoint: Node | None = None,
            *arguments: str,
            host: Host | None = None,
            out: str = "",
            nodes: str = "1:4",
            workers: int = 1,
        ) -> Node:
            host = host or network.add()
            file = tmp_path / "recipe.toml"
            file.write_text(recipe.to_toml())
            place = tmp_path / (out or host.name) / "run"
            met = (endpoint.host if endpoint else host).name
            command = [
                *(sys.executable, "-m", "samestep", "train", str(file)),
                *("--nodes", nodes, "--rdzv-endpoint", f"{met}:{PORT}"),
                *("--interface", "10.0.0.0/24", "--workers", str(workers)),
                *("--out", str(place), "--no-report", "--no-tensorboard"),
                *("--snapshot-seconds", "0.05", "--max-restarts", "20", *arguments),
            ]
            log = tmp_path / f"{host.name}.log"
            output = stack.enter_context(log.open("ab"))
            process = host.start(command, stdout=output, stderr=output)
            return Node(host, process, place, log)

        yield run


def members(node: Node) -> list[list[str]]:
    """Return the hosts of each generation, as this one saw them."""
    return [
        [machine["host"] for machine in event["machines"]]
        for event in node.events("generation")
    ]


def assert_listens_where_asked(nodes: list[Node]) -> None:
    """Assert that each listens on the chosen interface, and else on loopback only."""
    for node in nodes:
        octets = map(int, reversed(node.host.address.split(".")))
        own = "".join(f"{octet:02X}" for octet in octets)
        addresses = {address for address, _ in node.host.listeners()}
        assert own in addresses
        assert addresses <= {own, *LOOPBACK}


@pytest.mark.parametrize(
    ("workers", "balance"), [((2, 1, 2), "random"), ((1, 1, 1, 1), "auto")]
)
def test_hosts_give_the_weights_of_one(
    start: Start, whole: Run, recipe: Recipe, workers: tuple[int, ...], balance: str
) -> None:
    how, nodes = ("--balance", balance), list[Node]()
    for count in workers:
        first = nodes[0] if nodes else None
        size = str(len(workers))
        nodes.append(start(recipe, first, *how, nodes=size, workers=count))
    for node in nodes:
        wait_for(partial(node.events, "epoch"), *nodes)
    assert_listens_where_asked(nodes)
    hurry()
    assert_same(whole, *nodes)


def test_a_host_that_was_cut_off_is_done_without_and_comes_back(
    start: Start, whole: Run, recipe: Recipe, network: Network
) -> None:
    a = start(recipe, None, *SOON)
    b = start(recipe, a, *SOON, workers=2)
    wait_for(lambda: members(a)[-1:] and len(members(a)[-1]) == 2, a, b)
    wait_for(lambda: b.events("epoch"), a, b)
    network.cut(b.host)
    wait_for(lambda: members(a)[-1] == ["h1"], a)
    done = len(a.events("epoch"))
    wait_for(lambda: len(a.events("epoch")) > done, a)
    network.heal(b.host)
    wait_for(lambda: len(members(a)[-1]) == 2, a)
    hurry()
    assert_same(whole, a, b)


@pytest.mark.parametrize("is_cut", [True, False])
def test_the_loss_of_a_host_is_noticed_at_once_and_counts_as_no_failure(
    start: Start, whole: Run, recipe: Recipe, network: Network, is_cut: bool
) -> None:
    """Also where no connection is closed, long before `--hang-timeout`."""
    a = start(recipe, None, "--max-restarts", "0", "--hang-timeout", "500")
    b = start(recipe, a, "--max-restarts", "0", "--hang-timeout", "500")
    wait_for(lambda: b.events("epoch"), a, b)
    network.cut(b.host) if is_cut else b.kill()
    wait_for(lambda: members(a)[-1] == ["h1"], a)
    b.kill()
    hurry()
    assert_same(whole, a)


@pytest.fixture
def etcd(network: Network, tmp_path: Path) -> Iterator[list[Host]]:
    """Yield three hosts, each with a member of a cluster of etcd."""
    # Its package installs it beside Python, which need not be on the PATH.
    places = [str(Path(sys.executable).parent), os.environ["PATH"]]
    program = shutil.which("etcd", path=os.pathsep.join(places))
    if program is None:
        pytest.skip("etcd is not installed")
    hosts = [network.add() for _ in range(3)]
    cluster = ",".join(f"{h.name}=http://{h.address}:2380" for h in hosts)
    with (tmp_path / "etcd.log").open("ab") as log:
        for host in hosts:
            clients, peers = (f"http://{host.address}:{p}" for p in (2379, 2380))
            command = [
                *(program, "--enable-v2", "--name", host.name),
                *("--data-dir", str(tmp_path / f"etcd-{host.name}")),
                *("--listen-client-urls", clients, "--advertise-client-urls", clients),
                *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
                *("--initial-cluster", cluster),
            ]
            host.start(command, stdout=log, stderr=log)
        yield hosts


def test_with_etcd_any_host_may_be_lost(
    start: Start, whole: Run, recipe: Recipe, etcd: list[Host]
) -> None:
    """It is rank 0, and perhaps etcd's leader. Then another job has the same name."""

    def join(host: Host, out: str = "") -> Node:
        etcd = ("--rdzv-backend", "etcd-v2", "--rdzv-id", "proof")
        member = ("--rdzv-endpoint", f"{host.name}:2379")
        return start(recipe, None, *etcd, *member, host=host, out=out)

    nodes = a, b, c = [join(host) for host in etcd]
    wait_for(lambda: members(a) and len(members(a)[-1]) == 3, *nodes)
    wait_for(lambda: a.events("epoch"), *nodes)
    a.kill()
    wait_for(lambda: len(members(b)[-1]) == 2, b, c)
    done = len(b.events("epoch"))
    wait_for(lambda: len(b.events("epoch")) > done, b, c)
    hurry()
    assert_same(whole, b, c)
    assert_same(whole, join(c.host, "again"))


def test_every_host_is_replaced_while_it_trains(
    start: Start, whole: Run, recipe: Recipe
) -> None:
    """The last is that where they meet: this ends the run, with a checkpoint."""
    a = start(recipe)
    b = start(recipe, a)
    wait_for(lambda: b.events("epoch"), a, b)
    b.kill()
    c = start(recipe, a)
    wait_for(lambda: members(c) and len(members(c)[-1]) == 2, a, c)
    wait_for(lambda: c.events("epoch"), a, c)
    a.kill()
    assert c.end() == 75, c.log
    assert "samestep resume" in c.log
    assert "With `--rdzv-backend etcd-v2` any machine may be lost" in c.log
    left = checkpoint.steps(checkpoint.directory_of(c.out))[-1]
    assert left > 0

    c = start(recipe, None, host=c.host)
    d = start(recipe, c)
    wait_for(lambda: members(d) and len(members(d)[-1]) == 2, c, d)
    assert d.events("generation")[0]["step"] >= left
    hurry()
    assert_same(whole, c, d)
