"""One worker: a process that takes part in a job, whoever started it.

Its place comes from torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR, MASTER_PORT), its job and its reports go over a socket to the supervisor.
"""

import json
import os
import re
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DDP and optimizers need it: here once, not in every worker
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from samestep import dataset, evaluation, training, weights
from samestep.errors import PeerLost, RunError, SamestepError
from samestep.fingerprint import fingerprint
from samestep.models import mlp
from samestep.recipe import Recipe


START_TIMEOUT = timedelta(seconds=120)
EXCHANGE_TIMEOUT = timedelta(minutes=5)

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

    @classmethod
    def from_environment(cls) -> "Place":
        """From the variables that torchrun sets."""
        env = os.environ
        return cls(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
        )


class Control:
    """The socket to the supervisor."""

    def __init__(self, fd: int, rank: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._rank = rank
        with self._socket.makefile("rb") as lines:
            self.job: dict[str, Any] = json.loads(lines.readline())
        threading.Thread(target=self._end_with_supervisor, daemon=True).start()

    def send(self, message: dict[str, Any]) -> None:
        """One line of JSON."""
        line = json.dumps({**message, "rank": self._rank}) + "\n"
        self._socket.sendall(line.encode())

    def _end_with_supervisor(self) -> None:
        """The supervisor sends nothing after the job: the end of the socket is its."""
        self._socket.recv(1)
        os._exit(1)


def main(control_fd: int, store_fd: int | None = None) -> int:
    """Do the job; returns the exit code. Rank 0 serves the store on `store_fd`."""
    place = Place.from_environment()
    control = Control(control_fd, place.rank)
    try:
        with process_group(place, store_fd):
            run(control, place.rank)
    except BaseException as error:
        control.send(_failure(error))
        return 1
    return 0


def run(control: Control, rank: int) -> None:
    """All workers: the job of one kind."""
    job = control.job
    recipe = Recipe.from_dict(job["recipe"])
    torch.set_num_threads(recipe.threads)
    # Subnormal numbers are slow; the mode decides bits, so all workers set it.
    torch.set_flush_denormal(True)
    if job["kind"] == "train":
        trainer = training.build(recipe, rank, control.send)
        training.train(trainer, Path(job["model_file"]))
    else:
        evaluate(recipe, job, rank, control)


def evaluate(recipe: Recipe, job: dict[str, Any], rank: int, control: Control) -> None:
    """All workers: the weights of a file on one split."""
    data = dataset.load(recipe.data)
    split = data.splits[job["split"]]
    if len(split) == 0:
        raise RunError(f"The recipe {recipe.name} holds out no {job['split']} samples.")
    model = mlp.build(recipe.model, data.num_inputs, data.num_classes)
    model.load_state_dict(weights.load(Path(job["model_file"])))
    sums = evaluation.evaluate(model, split, recipe.evaluation_batch, rank)
    if rank == 0:
        control.send(
            {
                "type": "evaluated",
                **sums.means(),
                "samples": sums.samples,
                "correct": sums.correct,
                "weights_sha256": fingerprint(model.state_dict()),
            }
        )


@contextmanager
def process_group(place: Place, store_fd: int | None) -> Iterator[None]:
    """A Gloo group of all workers. The store listens where `store_fd` does."""
    store = TCPStore(
        place.address,
        place.port,
        place.workers,
        is_master=place.rank == 0,
        timeout=START_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=store_fd,
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=place.rank,
        world_size=place.workers,
        timeout=EXCHANGE_TIMEOUT,
    )
    yield
    dist.destroy_process_group()


def _failure(error: BaseException) -> dict[str, Any]:
    text = "".join(traceback.format_exception(error))
    message = str(error) or type(error).__name__
    if isinstance(error, SamestepError):
        kind = type(error).__name__
    elif isinstance(error, RuntimeError) and PEER_LOST.search(message):
        kind, message = PeerLost.__name__, f"A worker lost its peers: {message}"
    else:
        kind, message = "WorkerFailed", f"{type(error).__name__}: {message}"
    return {"type": "failed", "error": kind, "message": message, "traceback": text}
