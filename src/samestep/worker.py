"""One worker: a process that takes part in a job, whoever started it.

Its place comes from torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), its job and its reports go over a socket to the supervisor.
"""

import ctypes
import faulthandler
import json
import os
import re
import signal
import socket
import threading
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from samestep import (
    dataset,
    exactness,
    memory,
    models,
    precision,
    probe,
    training,
    weights,
)
from samestep.balance import shares
from samestep.board import Board
from samestep.data_sections import CustomData, ImageData, NpyData
from samestep.device import Device
from samestep.errors import OwnCodeError, PeerLost, RunError, SamestepError
from samestep.evaluation import Evaluator
from samestep.exchange import Exchange
from samestep.exchange.shared import SharedExchange
from samestep.faults import Faults
from samestep.feed import Helper, MicroBatches
from samestep.fingerprint import fingerprint
from samestep.flat import Flat
from samestep.handover import Received
from samestep.imports import own_frames
from samestep.launch import resources
from samestep.own import OwnCode, find_loss, names
from samestep.recipe import Recipe
from samestep.rehearsal import rehearse
from samestep.rounding import Rounding
from samestep.trainer import Surroundings, build, load_data
from samestep.tree import Node


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

MAY_TAKE_LONG = (CustomData, ImageData, NpyData)
"""Data that are drawn by the user's code, or that may be larger than the memory."""

# What Gloo says when a connection ends under an operation.
PEER_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Read error|timed out|Timed out|"
    r"connectFullMesh|Application timeout"
)


@dataclass(frozen=True)
class Place:
    """This worker among all."""

    rank: int
    workers: int
    address: str
    port: int
    local_rank: int = 0
    """Among those of this machine."""

    @classmethod
    def from_environment(cls) -> "Place":
        """From the variables that torchrun sets."""
        env = os.environ
        return cls(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            int(env["LOCAL_RANK"]),
        )


class Control:
    """The socket to the supervisor."""

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
    """Do the job; returns the exit code. `launch.resources` lists the descriptors."""
    # The supervisor asks for the stacks of a worker that hangs; they go into its log.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    place = Place.from_environment()
    control = Control(fds["control"], place.rank)
    board = Board(fds["board"], place.rank)
    try:
        run(control, place, fds, board)
    except BaseException as error:
        traceback.print_exc()
        control.send(_failure(error))
        return 1
    return 0


def run(control: Control, place: Place, fds: dict[str, int], board: Board) -> None:
    """All workers: the job of one kind."""
    job = control.job
    recipe = Recipe.from_dict(job["recipe"])
    precision.check(recipe)
    torch.set_num_threads(recipe.threads)
    _keep_memory()
    # Subnormal numbers are slow; the mode decides bits, so all workers set it.
    torch.set_flush_denormal(True)
    rounding = Rounding.of(recipe.compression)
    own = OwnCode(job["places"], Received(fds.get("objects"), job.get("objects", {})))
    helper = _helper(recipe, job, own, fds)
    control.watch()
    faults = Faults(place.rank, job["faults"], control.send)
    around = Surroundings(
        rank=place.rank,
        workers=place.workers,
        connect=partial(_connect, job, rounding, place, fds),
        report=control.send,
        board=board,
        faults=faults,
        snapshots=fds.get("snapshots"),
        snapshot_seconds=job["snapshot_seconds"],
        balance=job["balance"],
        evict_slower_than=job["evict_slower_than"],
        profile=job["profile"],
        helper=helper,
        constants=fds.get("constants"),
        own=own,
        most_samples=job.get("most_samples"),
        device=Device.prepare(job["device"], place.local_rank),
    )
    if job["kind"] == "train":
        faults.at("start", job["step"])
        training.train(build(recipe, around))
    elif job["kind"] == "measure":
        probe.measure(recipe, around, job, probe.StepTimes(fds["board"], place.rank))
    elif job["kind"] == "limit":
        measure_alone(recipe, around, job, fds)
    elif job["kind"] == "check":
        exactness.probe(build(recipe, around), job["steps"], control.send)
    else:
        evaluate(recipe, control, around)


def _helper(
    recipe: Recipe, job: dict[str, Any], own: OwnCode, fds: dict[str, int]
) -> Helper | None:
    """Forked while there is one thread and nothing is loaded."""
    if job["kind"] != "train" or not job["prefetch"]:
        return None
    if not isinstance(recipe.data, MAY_TAKE_LONG):
        return None
    unused = [fd for name, fd in fds.items() if name != "objects"]
    return Helper.start(lambda: MicroBatches(*load_data(recipe, own)), unused)


def evaluate(recipe: Recipe, control: Control, around: Surroundings) -> None:
    """All workers: the weights of a file on one split."""
    job, workers = control.job, around.workers
    data = dataset.load(recipe.data, around.own)
    split = data.splits[job["split"]]
    if len(split) == 0:
        raise RunError(f"The recipe {recipe.name} holds out no {job['split']} samples.")
    model = models.build(recipe.model, data, around.own)
    model.load_state_dict(weights.load(Path(job["model_file"])))
    model = around.device.move(model)
    exchange = around.connect(Flat(model), shares(workers, workers))
    loss = find_loss(recipe, around.own)
    if names(recipe):
        found = rehearse(recipe, data, model, loss)
        data = replace(data, own_metrics=found.metrics)
    evaluator = Evaluator(
        model, recipe, data, around.rank, exchange, around.board, around.device, loss
    )
    sums = evaluator.evaluate(job["split"])
    if around.rank == 0:
        control.send(
            {
                "type": "evaluated",
                "means": sums.means(data.metrics),
                "own_metrics": [metric.name for metric in data.own_metrics],
                "targets": sums.targets,
                "weights_sha256": fingerprint(model.state_dict()),
            }
        )


def measure_alone(
    recipe: Recipe, around: Surroundings, job: dict[str, Any], fds: dict[str, int]
) -> None:
    """Each worker is a group of its own; they only agree on when to measure."""
    times = probe.StepTimes(fds["board"], around.rank)
    gate = probe.Gate(fds["snapshots"], around.rank)
    with resources(job["exchange"], 1) as (own, port):
        rounding = Rounding.of(recipe.compression)
        place = Place(0, 1, "127.0.0.1", port)
        connect = partial(_connect, job, rounding, place, own)
        alone = replace(
            around, rank=0, workers=1, connect=connect, snapshots=memory.create()
        )
        probe.measure_alone(recipe, alone, job, times, gate)


def _connect(
    job: dict[str, Any],
    rounding: Rounding,
    place: Place,
    fds: dict[str, int],
    flat: Flat,
    shares: list[Node],
) -> Exchange:
    timeout: float = job["peer_timeout"]
    if job["exchange"] == "shared":
        spin, fd = job["spin_seconds"], fds["memory"]
        return SharedExchange(flat, shares, place.rank, fd, spin, timeout, rounding)
    # DDP imports torch._dynamo, 0.9 s: only who needs it pays.
    from samestep.exchange.gloo import GlooExchange, join

    where = place.rank, place.workers, place.address, place.port
    join(job["exchange"], *where, timeout, fds.get("store"))
    return GlooExchange(flat, shares, place.rank, rounding)


def _keep_memory() -> None:
    """Tells glibc to reuse freed memory rather than to return it to the kernel.

    Otherwise every step faults in the pages of its temporaries again: 17 to 35 faults.
    Other C libraries have no such call and need none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _failure(error: BaseException) -> dict[str, Any]:
    cause = error.__cause__ if isinstance(error, OwnCodeError) else error
    own = own_frames(cause) if cause is not None else ""
    text = own or "".join(traceback.format_exception(error))
    message = str(error) or type(error).__name__
    if isinstance(error, SamestepError):
        kind = type(error).__name__
    elif isinstance(error, RuntimeError) and PEER_LOST.search(message):
        kind, message = PeerLost.__name__, f"A worker lost its peers: {message}"
    else:
        kind, message = "WorkerFailed", f"{type(error).__name__}: {message}"
    failed = {"type": "failed", "error": kind, "message": message, "traceback": text}
    return {**failed, "own": own}
