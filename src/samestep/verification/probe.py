"""The probe: check that user code gives the same result when it runs again, elsewhere.

At the start of a training and at the end of each epoch every worker computes one more
micro-batch, outside of the training. So does the witness, a process that takes no other
part in it. From the same weights all must get the same bits. They do not if the model,
the loss or the data remember earlier calls or depend on the process. The witness has
made few calls, and begins with another micro-batch, since a first call may create what
later ones use.

Such code would give another result after a restart or with another number of workers,
and nothing else would notice: over shared memory there is one copy of the weights,
which cannot differ from itself.

The workers compare at once. The witness answers later, and the training waits for it
only at its end.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TypeVar

import torch
from torch import Tensor

from samestep.core.plan import derive_seed
from samestep.data import pytree
from samestep.data.augment import Mixed
from samestep.data.prefetch import Drawn
from samestep.data.pytree import Nested
from samestep.errors import NotReproducible
from samestep.exchange import Merger, gather_cells
from samestep.messages import wire
from samestep.messages.processes import ReplayJob, ReplayRequest, ReplayResult
from samestep.models.device import Device
from samestep.models.objective import Objective
from samestep.state import dtypes
from samestep.state.fingerprint import raw_bytes
from samestep.state.flat import Flat, dense
from samestep.system import child_process, shared_memory
from samestep.system.heartbeat import Heartbeat


T = TypeVar("T")
Digests = dict[str, str]
"""SHA-256 of the samples, the loss, the gradients and the buffers."""
MICRO_BATCH = 0
"""The micro-batch that is computed again: the first is never empty."""
POLL_SECONDS = 0.05
CAUSE = (
    "Your own code remembers earlier calls (an attribute, a cache, a counter, its own "
    "generator) or depends on its process (its rank or id, the time, the environment), "
    "so another number of workers, or a restart, would change the result."
)
REMEDY = (
    "Keep state in a persistent buffer of the parameters' type, and draw from torch's "
    "default generator; `samestep check` looks closer, and `--no-probe` trains without "
    "this test."
)


@dataclass(frozen=True)
class Replay:
    """Computes micro-batches outside of the training, with the training's parts."""

    draw: Callable[[int, int], Drawn]
    objective: Objective
    flat: Flat
    seed: int
    device: Device
    record: Callable[[], str] | None = None
    """With portable arithmetic: the SHA-256 of the program, recorded once more. Its
    bits are not those of torch, which processors compute differently."""

    def digest(self, step: int) -> Digests:
        """Digest the forward and backward pass of one micro-batch.

        All tensors are left as they were.

        `step` counts from 0 over all epochs, and may be that after the last one.
        """
        self.device.seed(derive_seed(self.seed, "step", step, MICRO_BATCH))
        inputs, targets = self.device.to_device(*self.draw(step, MICRO_BATCH))
        samples = _sha256(_tensors(inputs, targets))
        if self.record is not None:
            return {"the samples": samples, "the program": self.record()}
        before = _sha256(self.flat.parameters)
        self.flat.restore_buffers()
        with dtypes.default(self.flat.dtype):
            loss, _ = self.objective(inputs, targets)
            loss.backward()
        gradients = [dense(p.grad) for p in self.flat.parameters if p.grad is not None]
        for parameter in self.flat.parameters:
            parameter.grad = None
        buffers = self.flat.read_buffers()
        self.flat.restore_buffers()
        if _sha256(self.flat.parameters) != before:
            raise NotReproducible(
                "Only the optimizer may change parameters, or workers would compute "
                "with different ones; a pass through the model changed some. Compute "
                "with a changed copy instead."
            )
        return {
            "the samples": samples,
            "the loss": _sha256([loss]),
            "the gradients": _sha256(gradients),
            "the buffers": _sha256([buffers]),
        }


@dataclass
class Witness:
    """The worker's end of the connection to the witness."""

    connection: Connection
    pid: int
    fd: int
    """Descriptor of the memory for weights and buffers."""

    @classmethod
    def start(
        cls, build: Callable[[ReplayJob], Replay], unused: Iterable[int]
    ) -> "Witness":
        """Fork the witness; in its process `build` gets the job.

        `child_process.fork` explains `unused`.
        """
        fd = shared_memory.create()
        return cls(
            *child_process.fork(lambda ours: _serve(ours, fd, build), unused), fd
        )

    def begin(self, job: ReplayJob) -> None:
        """Send the job."""
        self.connection.send_bytes(wire.encode(job))

    def ask(self, step: int, flat: Flat, parameters: Tensor) -> None:
        """Ask for the digests at a step, with these weights. One at a time."""
        state = torch.cat([parameters, flat.saved_buffers()]).cpu().numpy()
        size = state.nbytes
        with shared_memory.reserve(
            self.fd, size, "The probe", "Use `--no-probe`."
        ) as area:
            area[:size] = state.tobytes()
        request = ReplayRequest(step=step, counts=flat.counts)
        self.connection.send_bytes(wire.encode(request))

    def answer(self, seconds: float) -> ReplayResult | None:
        """Return the answer, or None if there is none within `seconds`.

        Raises EOFError, OSError if the witness has ended.
        """
        if not self.connection.poll(seconds):
            return None
        answer: ReplayResult = wire.decode(self.connection.recv_bytes(), ReplayResult)
        return answer


def _serve(
    connection: Connection, fd: int, build: Callable[[ReplayJob], Replay]
) -> None:
    """Be the witness: load and build at the first request, and answer all requests."""
    replay: Replay | None = None
    try:
        job = wire.decode(connection.recv_bytes(), ReplayJob)
        while True:
            request = wire.decode(connection.recv_bytes(), ReplayRequest)
            try:
                replay = replay or _bound(build(job))
                answer = ReplayResult(digests=_replay(replay, fd, request))
            except Exception as error:
                answer = ReplayResult(error=f"{type(error).__name__}: {error}")
            connection.send_bytes(wire.encode(answer))
    except (EOFError, OSError):  # the worker has ended
        return


def _bound(replay: Replay) -> Replay:
    """Align the parameters as in a worker: the alignment of a product decides bits."""
    flat = replay.flat
    flat.bind(flat.parameters[0].new_zeros(flat.size), write=True)
    return replay


def _replay(replay: Replay, fd: int, request: ReplayRequest) -> Digests:
    flat = replay.flat
    with open(fd, "rb", closefd=False) as file:
        file.seek(0)
        state = torch.frombuffer(bytearray(file.read()), dtype=flat.parameters[0].dtype)
    values = state[: flat.size + flat.tail].to(flat.device)
    with torch.no_grad():
        for parameter, value in zip(flat.parameters, flat.views(values), strict=True):
            parameter.copy_(value)
    flat.set_buffers(values[flat.size :], request.counts)
    # What a first call leaves behind comes from another micro-batch than the one asked
    # for, so that it differs from what a worker has.
    replay.digest(request.step + 1)
    return replay.digest(request.step)


@dataclass
class Probe:
    """One worker's part of the probe."""

    replay: Replay
    exchange: Merger
    parameters: Tensor
    """All weights [size]."""
    rank: int
    heartbeat: Heartbeat
    warn: Callable[[str], None]
    witness: Witness | None = None
    """The witness of the first worker, until it fails."""
    timeout: float = 60.0
    """Seconds that the end of the training waits for the witness."""
    _asked: tuple[int, Digests] | None = None
    """The open question to the witness: the step, and this worker's digests."""
    _waiting: tuple[int, Digests] | None = None
    """The newest question, while the witness computes an earlier one."""

    def run(self, step: int) -> None:
        """All workers, between two steps: probe. Raises NotReproducible."""
        self.heartbeat.beat()
        digests = self.replay.digest(step)
        self.heartbeat.at_barrier()
        self._compare(step, digests)
        self.poll()
        self._waiting = step, digests
        self._ask()

    def poll(self, seconds: float = 0.0) -> None:
        """Check the answer of the witness, if it has come. Raises NotReproducible."""
        if self._asked is None:
            return
        answer = self._guarded(lambda witness: witness.answer(seconds))
        if answer is None:
            return
        (step, own), self._asked = self._asked, None
        if answer.error:
            self._give_up(answer.error)
            return
        differing = [name for name in own if own[name] != answer.digests[name]]
        if differing:
            raise NotReproducible(
                f"The same micro-batch gave another result in another process: "
                f"{', '.join(differing)} at step {step + 1}. {CAUSE} {REMEDY}"
            )

    def finish(self) -> None:
        """All workers, at the end: wait for the last answer. Raises NotReproducible.

        The others wait, too: they would change the weights that are still to be sent.
        """
        end = time.monotonic() + self.timeout
        while self._asked is not None and time.monotonic() < end:
            self.heartbeat.beat()
            self.poll(POLL_SECONDS)
            self._ask()  # the weights are still those of the last epoch's end
        if self._asked is not None:
            self._give_up(f"it has not answered for {self.timeout:.0f} s")
        self.heartbeat.at_barrier()
        self.exchange.merge(torch.zeros(1, dtype=torch.float64))

    def _ask(self) -> None:
        """Ask the witness, unless it still computes: then it may miss an epoch."""
        if self.witness is None or self._asked is not None or self._waiting is None:
            return
        self._asked, self._waiting = self._waiting, None
        step = self._asked[0]
        self._guarded(lambda w: w.ask(step, self.replay.flat, self.parameters))

    def _compare(self, step: int, digests: Digests) -> None:
        """All workers: compare the digests. Raises NotReproducible."""
        # 48 bits of each digest fit exactly into a float64.
        own = [int(digest[:12], 16) for digest in digests.values()]
        by_name = zip(*gather_cells(self.exchange, self.rank, own), strict=True)
        differing = [
            name
            for name, cells in zip(digests, by_name, strict=True)
            if len(set(cells)) > 1
        ]
        if differing:
            raise NotReproducible(
                f"The same micro-batch gave another result in another worker: "
                f"{', '.join(differing)} at step {step + 1}. {CAUSE} {REMEDY}"
            )

    def _guarded(self, action: Callable[[Witness], T]) -> T | None:
        """Return the result of an action, or None if the witness has died."""
        assert self.witness is not None
        try:
            return action(self.witness)
        except (EOFError, OSError) as error:
            self._give_up(f"its process has ended ({type(error).__name__})")
            return None

    def _give_up(self, reason: str) -> None:
        self.witness = self._asked = self._waiting = None
        self.warn(
            f"The probe no longer compares with another process: {reason}. The workers "
            "still compare with each other."
        )


def _tensors(inputs: Nested, targets: Nested | Mixed) -> list[Tensor]:
    """Return all tensors of samples, in their order."""
    parts = targets.parts if isinstance(targets, Mixed) else targets
    return [tensor for _, tensor in pytree.leaves((inputs, parts))]


def _sha256(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the values of all tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
