"""Several machines played on one: nodes with memory of their own, over the loopback."""

import json
import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from samestep import Placement, Recipe, Run
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import exchange_fields
from samestep.supervisor.launch import PRELOAD, _environment
from samestep.system import barrier, shared_memory
from samestep.system.heartbeat import Heartbeat


Message = dict[str, Any]
PATIENCE = 120.0


@dataclass
class Machine:
    """One node."""

    workers: int
    memory: int
    heartbeat: int
    snapshots: int

    def state(self, layout: Layout) -> State | None:
        """The newest that it holds."""
        return Snapshots(self.snapshots, layout, self.workers).newest()


@dataclass
class Machines:
    """All nodes of one training."""

    nodes: list[Machine]
    controls: list[socket.socket] = field(default_factory=list)
    said: list[list[Message]] = field(default_factory=list)
    """The messages of each worker."""

    def listen(self, stuck: Sequence[int] = ()) -> None:
        """Until all workers have ended, but for those that are stopped."""
        buffers = {rank: b"" for rank in range(len(self.controls)) if rank not in stuck}
        end = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            for rank in buffers:
                selector.register(self.controls[rank], selectors.EVENT_READ, rank)
            while selector.get_map():
                assert time.monotonic() < end, f"still running: {self.said}"
                for key, _ in selector.select(1.0):
                    if data := self.controls[key.data].recv(1 << 16):
                        *lines, buffers[key.data] = (buffers[key.data] + data).split(
                            b"\n"
                        )
                        self.said[key.data] += map(json.loads, lines)
                    else:
                        selector.unregister(key.fileobj)

    def of_leaders(self, kind: str) -> list[list[Message]]:
        """The messages of one kind, of the first worker of each node."""
        firsts = [
            sum(n.workers for n in self.nodes[:i]) for i in range(len(self.nodes))
        ]
        return [[m for m in self.said[r] if m["type"] == kind] for r in firsts]

    def runs(self) -> list[Run]:
        """What each node's leader reported, as a run without files."""
        pairs = zip(self.of_leaders("epoch"), self.of_leaders("finished"), strict=True)
        return [_run(epochs, finished) for epochs, (finished,) in pairs]


def _run(epochs: list[Message], finished: Message) -> Run:
    history = [{k: e[k] for k in e if k not in ("type", "rank")} for e in epochs]
    last = {"noise_scale": history[-1]["noise_scale"], "epochs": history}
    return Run(Path(), finished | last)


@contextmanager
def machines(
    server: ForkServer,
    logs: Path,
    recipe: Recipe,
    sizes: Sequence[int],
    exchange: Literal["shared", "gloo"] = "shared",
    **fields: Any,
) -> Iterator[Machines]:
    """A training on nodes of so many workers, started; `fields` change its job."""
    workers, pids = sum(sizes), list[int]()
    placement = Placement(workers=workers, exchange=exchange)
    placement, _ = placement.resolve(recipe.micro_batches)
    job = {"kind": "train", "recipe": recipe.to_dict(), "step": 0}
    job |= exchange_fields(placement) | fields
    with ExitStack() as stack:
        nodes = [_machine(stack, size) for size in sizes]
        store = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        played = Machines(nodes, said=[[] for _ in range(workers)])
        try:
            for node, machine in enumerate(nodes):
                for local in range(machine.workers):
                    env = _place(len(played.controls), workers, local, node, sizes)
                    env |= {"MASTER_PORT": str(store.getsockname()[1])}
                    ours, theirs = socket.socketpair()
                    stack.enter_context(ours)
                    fds = {"control": theirs.fileno(), **_descriptors(machine)}
                    if not played.controls:
                        fds["store"] = store.fileno()
                    log = logs / f"rank-{len(played.controls)}.log"
                    with theirs:
                        pids.append(server.spawn(env, log, fds, PRELOAD[exchange]))
                    ours.sendall(json.dumps(job).encode() + b"\n")
                    played.controls.append(ours)
            yield played
        finally:
            left, end = set(pids), time.monotonic() + PATIENCE
            for pid in pids:
                server.kill(pid)
            while left and time.monotonic() < end:
                left -= {pid for pid, _ in server.exits(0.1)}


def _machine(stack: ExitStack, size: int) -> Machine:
    fds = barrier.create(size), Heartbeat.create(size), shared_memory.create()
    for fd in fds:
        stack.callback(os.close, fd)
    return Machine(size, *fds)


def _descriptors(machine: Machine) -> dict[str, int]:
    return {
        "memory": machine.memory,
        "board": machine.heartbeat,
        "snapshots": machine.snapshots,
    }


def _place(
    rank: int, workers: int, local: int, node: int, sizes: Sequence[int]
) -> dict[str, str]:
    return _environment(rank, workers, 0) | {
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(sizes[node]),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(len(sizes)),
    }
