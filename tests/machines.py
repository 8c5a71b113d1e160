"""Several machines played on one: nodes with memory of their own, over the loopback."""

import os
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from samestep import Placement, Recipe, Run
from samestep.messages import wire
from samestep.messages.job import TrainingJob
from samestep.messages.training import EpochRecord, Failed, Finished, Message
from samestep.messages.wire import as_record
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State
from samestep.supervisor.forkserver_client import ForkServer
from samestep.supervisor.job import make_setup
from samestep.supervisor.launch import PRELOAD, Worker, _end, _environment
from samestep.system import barrier, shared_memory
from samestep.system.heartbeat import Heartbeat


T = TypeVar("T")
PATIENCE = 120.0


@dataclass
class Machine:
    """One node."""

    workers: int
    memory: int
    heartbeat: int
    snapshots: int

    def state(self, layout: Layout) -> State | None:
        """Return the newest state that it holds."""
        return Snapshots(self.snapshots, layout, self.workers).newest()


@dataclass
class Machines:
    """All nodes of one training."""

    nodes: list[Machine]
    workers: list[Worker] = field(default_factory=list)
    said: list[list[Message]] = field(default_factory=list)
    """The messages of each worker."""

    def listen(self, stuck: Sequence[int] = ()) -> None:
        """Listen until all workers have ended, but for those that are stopped."""
        end = time.monotonic() + PATIENCE
        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                if worker.rank not in stuck:
                    selector.register(worker.control, selectors.EVENT_READ, worker)
            while selector.get_map():
                assert time.monotonic() < end, f"still running: {self.said}"
                for key, _ in selector.select(1.0):
                    self.said[key.data.rank] += key.data.receive()
                    if key.data.is_closed:
                        selector.unregister(key.fileobj)

    def failure(self, rank: int) -> Failed:
        """Return the last message of a worker, with which it failed."""
        last = self.said[rank][-1]
        assert isinstance(last, Failed)
        return last

    def of_leaders(self, kind: type[T]) -> list[list[T]]:
        """Return the messages of one kind, of the first worker of each node."""
        firsts = [
            sum(n.workers for n in self.nodes[:i]) for i in range(len(self.nodes))
        ]
        return [[m for m in self.said[r] if isinstance(m, kind)] for r in firsts]

    def runs(self) -> list[Run]:
        """Return what each node's leader reported, as a run without files."""
        epochs, finished = self.of_leaders(EpochRecord), self.of_leaders(Finished)
        pairs = zip(epochs, finished, strict=True)
        return [_run(records, result) for records, (result,) in pairs]


def _run(epochs: list[EpochRecord], finished: Finished) -> Run:
    history = [as_record(epoch) for epoch in epochs]
    last = {"noise_scale": history[-1]["noise_scale"], "epochs": history}
    return Run(Path(), as_record(finished) | last)


@contextmanager
def machines(
    server: ForkServer,
    logs: Path,
    recipe: Recipe,
    sizes: Sequence[int],
    exchange: Literal["shared", "gloo"] = "shared",
    **fields: Any,
) -> Iterator[Machines]:
    """Start a training on nodes of so many workers; `fields` change its set-up."""
    workers = sum(sizes)
    placement = Placement(workers=workers, exchange=exchange)
    placement, _ = placement.resolve(recipe.micro_batches)
    setup = replace(make_setup(recipe, placement), **fields)
    line = wire.encode(TrainingJob(setup=setup))
    with ExitStack() as stack:
        nodes = [_machine(stack, size) for size in sizes]
        store = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        played = Machines(nodes, said=[[] for _ in range(workers)])
        try:
            for node, machine in enumerate(nodes):
                for local in range(machine.workers):
                    rank = len(played.workers)
                    env = _place(rank, workers, local, node, sizes)
                    env |= {"MASTER_PORT": str(store.getsockname()[1])}
                    ours, theirs = socket.socketpair()
                    stack.enter_context(ours)
                    fds = {"control": theirs.fileno(), **_descriptors(machine)}
                    if rank == 0:
                        fds["store"] = store.fileno()
                    log = logs / f"rank-{rank}.log"
                    with theirs:
                        pid = server.spawn(env, log, fds, PRELOAD[exchange])
                    played.workers.append(Worker(rank, pid, ours, log))
                    ours.sendall(line)
                    ours.setblocking(False)
            yield played
        finally:
            _end(server, played.workers)


def _machine(stack: ExitStack, size: int) -> Machine:
    fds = barrier.create(size), Heartbeat.create(size), shared_memory.create()
    for fd in fds:
        stack.callback(os.close, fd)
    return Machine(size, *fds)


def _descriptors(machine: Machine) -> dict[str, int]:
    return {
        "memory": machine.memory,
        "heartbeat": machine.heartbeat,
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
