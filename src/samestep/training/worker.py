"""One worker: a process that takes part in a job, however it was started.

Its rank comes from torchrun's environment variables (`core.topology`). It receives its
job from the supervisor over a socket, and sends its reports back (`samestep.messages`).
"""

import faulthandler
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch._C._distributed_c10d import Store
from torch.distributed import DistError

from samestep.config import bf16
from samestep.config.recipe import Recipe
from samestep.core.topology import Topology
from samestep.data.prefetch import HelperProcess, MicroBatches
from samestep.data.sources import source_of
from samestep.errors import (
    OwnCodeError,
    PeerLost,
    SamestepError,
    TrainingError,
    UsageError,
)
from samestep.exchange.compression import Compression
from samestep.exchange.factory import Connection, tcp_store
from samestep.messages import wire
from samestep.messages.job import EvaluationJob, Job, MeasurementJob, Setup, TrainingJob
from samestep.messages.processes import ReplayJob
from samestep.messages.training import Evaluated, Failed, FaultInjected, Message
from samestep.models.device import Device
from samestep.state.fingerprint import fingerprint
from samestep.system import machine, shared_memory
from samestep.system.fault_injection import Faults
from samestep.system.heartbeat import Heartbeat
from samestep.system.resources import resources
from samestep.training import measure, train
from samestep.training.build import build_evaluator, build_trainer
from samestep.training.components import load_data, load_replay
from samestep.training.progress import own_metrics
from samestep.training.trainer import WorkerContext
from samestep.user_code.imports import user_frames
from samestep.user_code.references import UserCode, names
from samestep.user_code.transport import unpack
from samestep.verification import threads
from samestep.verification.probe import Replay, Witness


# Gloo's messages when a connection ends during an operation.
PEER_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Read error|timed out|Timed out|"
    r"connectFullMesh|Application timeout"
)


class Channel(Protocol):
    """The connection of a worker to the process that gives it its job."""

    job: Job

    def watch(self) -> None:
        """Start to watch the other process; end this one when that has ended."""

    def send(self, message: Message) -> None:
        """Report to the supervisor."""


class ControlSocket:
    """A channel over the socket to the supervisor."""

    def __init__(self, fd: int) -> None:
        """Receive the job from the socket. Raises WorkerFailed."""
        self._socket = socket.socket(fileno=fd)
        with self._socket.makefile("rb") as lines:
            self.job: Job = wire.decode(lines.readline(), Job)

    def watch(self) -> None:
        """Start to watch the supervisor; end this process when it has ended."""
        threading.Thread(target=self._end_with_supervisor, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message as one line of JSON."""
        self._socket.sendall(wire.encode(message))

    def _end_with_supervisor(self) -> None:
        # The supervisor sends nothing after the job, so only its end wakes this thread.
        self._socket.recv(1)
        os._exit(1)


def main(fds: dict[str, int]) -> int:
    """Do the job and return the exit code.

    `fds` are `control`, the socket to the supervisor, those of `system.resources`, and
    memory that outlives the worker: `snapshots`, `constants`, `objects`.
    """
    # The supervisor asks for the stacks of a worker that hangs; they go into its log.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    topology = Topology.from_environment()
    control = ControlSocket(fds["control"])
    heartbeat = Heartbeat(fds["heartbeat"], topology.local_rank)
    seconds = control.job.setup.start_timeout
    store = partial(tcp_store, topology, fds.get("store"), seconds)
    try:
        run(control, topology, fds, heartbeat, store)
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
    """All workers: do the job; return False if it was stopped before its end.

    `store` makes a fresh store, if the workers need one to meet. A `witness` that was
    forked before is used by the first worker, if the training is probed.
    """
    job, setup = control.job, control.job.setup
    recipe = Recipe.from_dict(setup.recipe)
    _set_up(recipe)
    user_code, helper = _user_code(setup, fds.get("objects")), None
    if isinstance(job, TrainingJob):
        # Both fork, which must come before anything starts a thread or loads data.
        helper = _helper(recipe, setup, user_code, fds)
        witness = _witness(recipe, setup, topology, fds, witness)
    threads.check(recipe.threads)
    compression = Compression.of(recipe.compression)
    control.watch()
    context = WorkerContext(
        setup=setup,
        recipe=recipe,
        topology=topology,
        fds=fds,
        connect=Connection(setup, topology, compression, fds.get("memory"), store),
        report=control.send,
        heartbeat=heartbeat,
        faults=Faults(
            topology.rank,
            setup.faults,
            lambda fault: control.send(FaultInjected(**vars(fault))),
        ),
        user_code=user_code,
        device=Device.prepare(
            setup.device, topology.local_rank, is_shared=setup.exchange == "gloo"
        ),
        helper=helper,
        witness=witness,
    )
    match job:
        case TrainingJob():
            return _train(job, context)
        case MeasurementJob(is_independent=True):
            _measure_alone(job, context)
        case MeasurementJob():
            _measure(job, context)
        case EvaluationJob():
            _evaluate(job, context)
    return True


def _train(job: TrainingJob, context: WorkerContext) -> bool:
    context.faults.at("start", job.step)
    trainer = build_trainer(context, job.conditions.get("samples", ""))
    trainer.until = job.until
    try:
        return train.train(trainer)
    except UsageError as error:  # no longer: the training has begun
        raise TrainingError(str(error)) from (error.__cause__ or error)


def _user_code(setup: Setup, objects: int | None) -> UserCode:
    if objects is None:
        return UserCode(setup.search_path)
    given = {n: partial(unpack, objects, parts) for n, parts in setup.objects.items()}
    return UserCode(setup.search_path, given)


def _helper(
    recipe: Recipe, setup: Setup, user_code: UserCode, fds: dict[str, int]
) -> HelperProcess | None:
    """Fork the helper process, for data that may take long to draw."""
    if not setup.prefetch or not source_of(recipe.data).may_be_slow:
        return None

    def load() -> MicroBatches:
        data, plan = load_data(recipe, user_code, setup.max_steps)
        return MicroBatches(data, plan, bool(names(recipe)))

    return HelperProcess.start(load, _unused(fds))


def _witness(
    recipe: Recipe,
    setup: Setup,
    topology: Topology,
    fds: dict[str, int],
    forked: Witness | None,
) -> Witness | None:
    """Fork the witness, in the first worker of a training with user code."""
    if not setup.probe or not names(recipe) or topology.rank > 0:
        if forked is not None:
            forked.connection.close()  # which ends it
        return None
    witness = forked or Witness.start(build_replay, _unused(fds))
    witness.begin(ReplayJob(setup=setup, objects=fds.get("objects")))
    return witness


def _unused(fds: dict[str, int]) -> list[int]:
    """Return the descriptors that a process forked for user code closes."""
    return [fd for name, fd in fds.items() if name != "objects"]


def build_replay(job: ReplayJob) -> Replay:
    """Build the parts with which the witness computes. Call it in the witness."""
    setup = job.setup
    recipe = Recipe.from_dict(setup.recipe)
    _set_up(recipe)
    user_code, device = _user_code(setup, job.objects), Device.prepare(setup.device, 0)
    return load_replay(recipe, user_code, setup.max_steps, device)


def _evaluate(job: EvaluationJob, context: WorkerContext) -> None:
    """All workers: evaluate the weights of a model file on one split."""
    evaluator = build_evaluator(context, job.split, Path(job.model_file))
    sums, parts = evaluator.evaluate(job.split), evaluator.parts
    if context.topology.is_leader:
        context.report(
            Evaluated(
                means=sums.means(parts.data.metrics),
                targets=round(sums.divisor(parts.data.metrics)),
                weights_sha256=fingerprint(parts.model.state_dict()),
                own_metrics=own_metrics(parts.data) or [],
            )
        )


def _measure(job: MeasurementJob, context: WorkerContext) -> None:
    """All workers: train together for some seconds, and report the speed."""
    times = measure.StepTimes(context.fds["heartbeat"], context.topology.local_rank)
    trainer = build_trainer(replace(context, heartbeat=times))
    measure.measure(trainer, times, context.report, job)


def _measure_alone(job: MeasurementJob, context: WorkerContext) -> None:
    """Measure a worker that trains alone, at the same time as others of its kind.

    Each is a group of one worker, so it makes its own exchange and snapshots. The
    descriptors are those of all: the workers only agree on when to measure.
    """
    setup, rank = context.setup, context.topology.rank
    compression = Compression.of(context.recipe.compression)
    times = measure.StepTimes(context.fds["heartbeat"], rank)
    gate = measure.Gate(context.fds["snapshots"], rank)
    with resources(setup.exchange, 1) as (fds, port):
        topology = Topology.on_one_node(0, 1, port)
        store = partial(tcp_store, topology, fds.get("store"), setup.start_timeout)
        alone = replace(
            context,
            topology=topology,
            fds={"snapshots": shared_memory.create()},
            connect=Connection(setup, topology, compression, fds.get("memory"), store),
            heartbeat=times,
        )
        measure.measure(build_trainer(alone), times, context.report, job, gate)


def _set_up(recipe: Recipe) -> None:
    """Set what must be equal in all workers before anything is computed."""
    bf16.check(recipe)
    torch.set_num_threads(recipe.threads)
    # Subnormal numbers are slow; the mode decides bits, so all workers set it. Portable
    # arithmetic keeps them, since processors differ in what they flush.
    torch.set_flush_denormal(not recipe.is_portable)
    machine.keep_freed_memory()


def failure(error: BaseException) -> Failed:
    """Return the message of a worker that fails; `launch.exception` is its inverse."""
    # These two say what went wrong, so only the user's part of the traceback helps.
    is_explained = isinstance(error, OwnCodeError) or type(error) is TrainingError
    cause = error.__cause__ if is_explained else error
    own = user_frames(cause) if cause is not None else ""
    text = own or "".join(traceback.format_exception(error))
    message = str(error) or type(error).__name__
    if isinstance(error, SamestepError):
        kind = type(error).__name__
    elif isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and PEER_LOST.search(str(error))
    ):
        kind, message = PeerLost.__name__, f"A worker lost its peers: {message}"
    else:
        kind, message = "WorkerFailed", f"{type(error).__name__}: {message}"
    return Failed(error=kind, message=message, traceback=text, own=own)
