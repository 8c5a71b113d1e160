"""One worker: a process that takes part in a job, whoever started it.

Its place comes from torchrun's environment variables (`core.topology`), its job and
its reports go over a socket to the supervisor.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from samestep.config import bf16
from samestep.config.data import CustomData, ImageData, NpyData
from samestep.config.recipe import Recipe
from samestep.core.topology import Topology
from samestep.data.prefetch import Helper, MicroBatches
from samestep.errors import (
    OwnCodeError,
    PeerLost,
    SamestepError,
    TrainingError,
    UsageError,
)
from samestep.exchange.compression import Compression
from samestep.exchange.factory import Connection, tcp_store
from samestep.models.device import Device
from samestep.state.fingerprint import fingerprint
from samestep.system import shared_memory
from samestep.system.fault_injection import Fault, Faults
from samestep.system.heartbeat import Heartbeat
from samestep.system.resources import resources
from samestep.training import measure, train
from samestep.training.build import (
    Assistants,
    Memory,
    TrainSettings,
    WorkerContext,
    build_evaluator,
    build_trainer,
)
from samestep.training.components import load_data, load_replay
from samestep.training.progress import own_metrics
from samestep.user_code.imports import own_frames
from samestep.user_code.references import UserCode, names
from samestep.user_code.transport import Received
from samestep.verification import threads
from samestep.verification.probe import Replay, Witness


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

MAY_TAKE_LONG = (CustomData, ImageData, NpyData)
"""Data that are drawn by the user's code, or that may be larger than the memory."""

# What Gloo says when a connection ends under an operation.
PEER_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Read error|timed out|Timed out|"
    r"connectFullMesh|Application timeout"
)


class Channel(Protocol):
    """Where a worker's job comes from and its reports go."""

    job: dict[str, Any]

    def watch(self) -> None:
        """From now on, this process ends with whoever started it."""

    def send(self, message: dict[str, Any]) -> None:
        """A report of plain JSON values."""


class ControlSocket:
    """The socket to the supervisor: a channel."""

    def __init__(self, fd: int, rank: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._rank = rank
        with self._socket.makefile("rb") as lines:
            self.job: dict[str, Any] = json.loads(lines.readline())

    def watch(self) -> None:
        """From now on, this process ends with the supervisor."""
        threading.Thread(target=self._end_with_supervisor, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """One line of JSON."""
        line = json.dumps({"rank": self._rank, **message}) + "\n"
        self._socket.sendall(line.encode())

    def _end_with_supervisor(self) -> None:
        """The supervisor sends nothing after the job: the end of the socket is its."""
        self._socket.recv(1)
        os._exit(1)


def main(fds: dict[str, int]) -> int:
    """Do the job; returns the exit code. `resources` lists the descriptors."""
    # The supervisor asks for the stacks of a worker that hangs; they go into its log.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    topology = Topology.from_environment()
    control = ControlSocket(fds["control"], topology.rank)
    heartbeat = Heartbeat(fds["board"], topology.local_rank)
    store = fds.get("store"), control.job["start_timeout"]
    try:
        run(control, topology, fds, heartbeat, partial(tcp_store, topology, *store))
    except BaseException as error:
        traceback.print_exc()
        control.send(failure(error))
        return 1
    return 0


def run(
    control: Channel,
    topology: Topology,
    fds: dict[str, int],
    heartbeat: Heartbeat,
    store: Callable[[], Store],
    witness: Witness | None = None,
) -> bool:
    """All workers: the job of one kind; whether it was done rather than stopped.

    `store` is asked for one that is fresh, if the workers need it to meet. A `witness`
    that was forked before is used by the first worker, if the training is probed.
    """
    job = control.job
    recipe = Recipe.from_dict(job["recipe"])
    _set_up(recipe)
    compression = Compression.of(recipe.compression)
    objects = Received(fds.get("objects"), job.get("objects", {}))
    user_code = UserCode(job["places"], objects)
    helper = _helper(recipe, job, user_code, fds)
    witness = _witness(recipe, job, topology, fds, witness)
    threads.check(recipe.threads)
    control.watch()
    faults = Faults(
        topology.rank,
        [Fault(**fields) for fields in job["faults"]],
        lambda fault: control.send({"type": "fault", **asdict(fault)}),
    )
    context = WorkerContext(
        topology=topology,
        connect=_connection(job, compression, topology, fds, store),
        report=control.send,
        heartbeat=heartbeat,
        faults=faults,
        user_code=user_code,
        device=Device.prepare(job["device"], topology.local_rank),
    )
    if job["kind"] == "evaluate":
        evaluate(recipe, job, context)
        return True
    settings = _settings(job)
    if job["kind"] == "limit":
        measure_alone(recipe, job, fds, context, settings)
        return True
    memory = Memory(fds["snapshots"], fds.get("constants"))
    if job["kind"] == "measure":
        times = measure.StepTimes(fds["board"], topology.local_rank)
        context = replace(context, heartbeat=times)
        trainer = build_trainer(recipe, context, settings, memory)
        measure.measure(trainer, times, context.report, job)
        return True
    faults.at("start", job["step"])
    trainer = build_trainer(
        recipe, context, settings, memory, Assistants(helper, witness)
    )
    with _begun():
        return train.train(trainer)


def _settings(job: dict[str, Any]) -> TrainSettings:
    return TrainSettings(
        snapshot_seconds=job["snapshot_seconds"],
        balance=job["balance"],
        drop_stragglers_below=job["drop_stragglers_below"],
        profile=job["profile"],
        probe=job["probe"],
        patience=job["hang_timeout"],
        most_steps=job.get("most_steps"),
        samples=job.get("samples", ""),
    )


def _helper(
    recipe: Recipe, job: dict[str, Any], own: UserCode, fds: dict[str, int]
) -> Helper | None:
    """Forked while there is one thread and nothing is loaded."""
    if job["kind"] != "train" or not job["prefetch"]:
        return None
    if not isinstance(recipe.data, MAY_TAKE_LONG):
        return None
    unused = [fd for name, fd in fds.items() if name != "objects"]
    is_own = bool(names(recipe))
    return Helper.start(lambda: MicroBatches(*load_data(recipe, own), is_own), unused)


def _witness(
    recipe: Recipe,
    job: dict[str, Any],
    topology: Topology,
    fds: dict[str, int],
    forked: Witness | None,
) -> Witness | None:
    """Fork the witness, in the first worker of a training of own code."""
    is_wanted = job["kind"] == "train" and job["probe"] and names(recipe)
    if not is_wanted or topology.rank > 0:
        if forked is not None:
            forked.connection.close()  # which ends it
        return None
    unused = [fd for name, fd in fds.items() if name != "objects"]
    witness = forked or Witness.start(build_replay, unused)
    told = "recipe", "places", "objects", "most_steps", "device"
    witness.begin({name: job.get(name) for name in told} | {"fd": fds.get("objects")})
    return witness


def build_replay(job: dict[str, Any]) -> Replay:
    """In the witness: build what it computes with from its job."""
    recipe = Recipe.from_dict(job["recipe"])
    _set_up(recipe)
    own = UserCode(job["places"], Received(job["fd"], job["objects"] or {}))
    return load_replay(recipe, own, job["most_steps"], Device.prepare(job["device"], 0))


def evaluate(recipe: Recipe, job: dict[str, Any], context: WorkerContext) -> None:
    """All workers: evaluate the weights of a model file on one split."""
    model_file = Path(job["model_file"])
    evaluator = build_evaluator(recipe, context, job["split"], model_file)
    sums, data = evaluator.evaluate(job["split"]), evaluator.data
    if context.topology.is_leader:
        context.report(
            {
                "type": "evaluated",
                "means": sums.means(data.metrics),
                "own_metrics": [],
                **own_metrics(data),
                "targets": round(sums.divisor(data.metrics)),
                "weights_sha256": fingerprint(evaluator.model.state_dict()),
            }
        )


def measure_alone(
    recipe: Recipe,
    job: dict[str, Any],
    fds: dict[str, int],
    context: WorkerContext,
    settings: TrainSettings,
) -> None:
    """Measure a worker that trains alone, at the same time as others of its kind.

    Each is a group of one worker, so it makes its own exchange and snapshots. `fds` are
    those of all: the workers only agree on when to measure.
    """
    times = measure.StepTimes(fds["board"], context.topology.rank)
    gate = measure.Gate(fds["snapshots"], context.topology.rank)
    with resources(job["exchange"], 1) as (own_fds, port):
        topology = Topology.on_one_node(0, 1, port)
        compression = Compression.of(recipe.compression)
        seconds = job["start_timeout"]
        store = partial(tcp_store, topology, own_fds.get("store"), seconds)
        connect = _connection(job, compression, topology, own_fds, store)
        alone = replace(context, topology=topology, connect=connect, heartbeat=times)
        memory = Memory(shared_memory.create())
        trainer = build_trainer(recipe, alone, settings, memory)
        measure.measure_alone(trainer, times, context.report, job, gate)


def _connection(
    job: dict[str, Any],
    compression: Compression,
    topology: Topology,
    fds: dict[str, int],
    store: Callable[[], Store],
) -> Connection:
    return Connection(
        job["exchange"],
        topology,
        job["peer_timeout"],
        job["start_timeout"] + job["peer_timeout"],
        job["spin_seconds"],
        compression,
        fds.get("memory"),
        store=store,
    )


def _set_up(recipe: Recipe) -> None:
    """Before anything is computed."""
    bf16.check(recipe)
    torch.set_num_threads(recipe.threads)
    _keep_memory()
    # Subnormal numbers are slow; the mode decides bits, so all workers set it.
    torch.set_flush_denormal(True)


def _keep_memory() -> None:
    """Tells glibc to reuse freed memory rather than to return it to the kernel.

    Otherwise every step faults in the pages of its temporaries again: 17 to 35 faults.
    Other C libraries have no such call and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


@contextlib.contextmanager
def _begun() -> Iterator[None]:
    """What would have been a wrong request before is now a training that failed."""
    try:
        yield
    except UsageError as error:
        raise TrainingError(str(error)) from (error.__cause__ or error)


def failure(error: BaseException) -> dict[str, Any]:
    """The message of a worker that fails; `launch.exception` is its inverse."""
    is_told = isinstance(error, OwnCodeError) or type(error) is TrainingError
    cause = error.__cause__ if is_told else error
    own = own_frames(cause) if cause is not None else ""
    text = own or "".join(traceback.format_exception(error))
    message = str(error) or type(error).__name__
    if isinstance(error, SamestepError):
        kind = type(error).__name__
    elif isinstance(error, DistError) or _is_of_gloo(error):
        kind, message = PeerLost.__name__, f"A worker lost its peers: {message}"
    else:
        kind, message = "WorkerFailed", f"{type(error).__name__}: {message}"
    failed = {"type": "failed", "error": kind, "message": message, "traceback": text}
    return {**failed, "own": own}


def _is_of_gloo(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(PEER_LOST.search(str(error)))
