"""The messages of the processes beside the workers: the fork server and the witness."""

from dataclasses import dataclass, field

from samestep.messages.job import Setup
from samestep.system.machine import Gpus


# The supervisor to the fork server (`training.forkserver`), and its answers.


@dataclass(frozen=True, kw_only=True)
class Spawn:
    """Fork a worker. A descriptor for each of `names` comes with this line."""

    env: dict[str, str]
    names: list[str]
    preload: list[str]
    """Modules that the fork server imports first."""
    command: list[str] = field(default_factory=list)
    """If given, a module, whose `main` is run and ends the process, and its arguments.
    The process leads a group, and outlives the fork server."""


@dataclass(frozen=True, kw_only=True)
class SendSignal:
    """Send a signal to a worker that has not been reaped."""

    pid: int
    number: int


@dataclass(frozen=True, kw_only=True)
class FindGpus:
    """Look for GPUs, in a process that ends afterwards."""


@dataclass(frozen=True, kw_only=True)
class BuildKnown:
    """Torch has been imported; `build` is what decides bits besides the recipe."""

    build: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class GpusFound:
    """The GPUs that workers can use."""

    gpus: Gpus


@dataclass(frozen=True, kw_only=True)
class Spawned:
    """A worker has been forked."""

    pid: int


@dataclass(frozen=True, kw_only=True)
class Exited:
    """A worker has ended; by signal -`code` if that is negative."""

    pid: int
    code: int


Request = Spawn | SendSignal | FindGpus
Answer = BuildKnown | GpusFound | Spawned | Exited


# A worker to its witness (`verification.probe`), and the answer.


@dataclass(frozen=True, kw_only=True)
class ReplayJob:
    """What the witness computes with."""

    setup: Setup
    objects: int | None
    """The descriptor of the memory with the objects given in Python."""


@dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """Compute a micro-batch of a step again, with the weights in the shared memory."""

    step: int
    counts: list[int]
    """The values of the integer buffers."""


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """The SHA-256 of what the witness computed, or its error."""

    digests: dict[str, str] = field(default_factory=dict)
    error: str = ""
