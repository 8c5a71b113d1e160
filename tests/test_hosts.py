"""Hosts with networks of their own: whatever happens to them, the same bits.

Every training here is one of several machines that torchrun starts; the hosts, their
switch and what is cut are real (`benchmarks/hosts.py`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, Network, why_not
from own_samples import EVERYTHING, HEAD
from test_elastic import SLOW, Machine, assert_same, hurry, wait_for

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
    Path("hurry").unlink()
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
    left = checkpoint.steps(checkpoint.directory_of(c.out))[-1]
    assert left > 0

    c = start(recipe, None, host=c.host)
    d = start(recipe, c)
    wait_for(lambda: members(d) and len(members(d)[-1]) == 2, c, d)
    assert d.events("generation")[0]["step"] >= left
    hurry()
    assert_same(whole, c, d)
