"""The placement: everything about a training that does not change its result."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from samestep.config.renames import PLACEMENT_NAMES, rename
from samestep.errors import PlacementError
from samestep.system import barrier, machine
from samestep.system.machine import Gpus


Counts = tuple[Annotated[int, Field(ge=0)], ...]
MOST_HASHED = 128
"""Micro-batches whose hashes have room in a snapshot (`state.snapshot`)."""


class Placement(BaseModel):
    """Where and how a recipe is trained: changes the time, never the result."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that compute gradients; auto: one for each usable physical core."""
    device: Literal["cpu", "auto", "cuda"] = "cpu"
    """What the workers compute on; auto: GPUs if there are any. A GPU gives other bits
    than a CPU, so it is only used on request."""
    exchange: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """How the workers' partial gradients become one sum; auto: shared if possible, nccl
    between GPUs. With gloo, workers may share GPUs."""
    hang_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a worker that others wait for counts as hung, from the first
    step on."""
    start_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds for each part of the work before the first step: to load the data, to
    build the model, to compile it. A worker that is stopped by a signal counts as hung
    after `hang_timeout` there, too."""
    balance: Literal["auto", "off", "random"] | Counts = "auto"
    """How micro-batches are divided: by measured speed (auto), evenly (off), in given
    numbers for each worker, or differently at every step (random: for tests)."""
    drop_stragglers_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Drop a worker that is slower than this fraction of the others' median speed."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """After a failure, go on with as few as this if the machine has lost cores or
    memory; by default never with fewer."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts in a row without any progress in between."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds between checkpoints on disk, besides those at the end of an epoch."""
    keep_checkpoints: Annotated[int, Field(ge=0)] = 0
    """Checkpoints that are kept besides the newest and the best, after evenly spaced
    steps, of which the last is that of all epochs: `samestep audit` begins there."""
    checkpoint_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps between checkpoints on disk, besides those by time; writing takes
    a twentieth of the time at most, so a newer one may replace one that waits."""
    snapshot_seconds: Annotated[float, Field(ge=0)] = 0.5
    """Seconds between snapshots in memory; 0: none, and only a final checkpoint."""
    prefetch: Literal["auto", "off"] = "auto"
    """Whether a process for each worker draws its samples ahead of time, if drawing
    takes more than a tenth of a step."""
    probe: bool = True
    """Whether to check that user code is reproducible: at the start and after each
    epoch, every worker and another process compute one micro-batch again."""
    verify: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of optimizer steps whose micro-batches a second worker computes, too,
    to find a processor or memory that is wrong at times; drawn by the seed."""
    ledger: Literal["steps", "micro-batches"] = "steps"
    """What the run has hashes of: every optimizer step (steps), and also every
    micro-batch, with the worker that computed it, so that `samestep audit` can name
    both (micro-batches). A resumed run keeps what it began with."""
    profile: Annotated[int, Field(ge=0, le=1000)] = 0
    """Steps whose phases, for every worker, are written to trace.json."""
    tensorboard: bool | None = None
    """Write TensorBoard events into the run directory; None: if tensorboardX is
    installed."""
    out: Path | None = Field(None, strict=False)
    """The run directory; by default runs/<recipe>-<UTC time>."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        is_dict = isinstance(fields, Mapping)
        return rename(fields, PLACEMENT_NAMES, warn=True) if is_dict else fields

    @property
    def num_workers(self) -> int:
        """The number of workers of a resolved placement."""
        assert isinstance(self.workers, int)
        return self.workers

    def resolve(
        self, micro_batches: int | None, gpus: Callable[[], Gpus] = Gpus
    ) -> tuple["Placement", str]:
        """Return the placement with a choice for every `auto`, and the reason in words.

        At most `micro_batches` workers can share the work; None: there is no limit.
        `gpus` is only called if a GPU may be used. Raises PlacementError.
        """
        most = micro_batches or sys.maxsize
        device, cores, limit = self._resolve_device(gpus)
        if self.workers == "auto":
            workers = min(cores, most)
            why = limit if workers == cores else "the recipe's micro-batches"
        else:
            workers, why = self.workers, "as asked for"
        if workers > most:
            raise PlacementError(
                f"{workers} workers cannot share {most} micro-batches: each worker "
                f"computes at least one. Use `--workers {most}`, or raise "
                "`--micro-batches` (this changes the recipe and so the result)."
            )
        if isinstance(self.balance, tuple) and micro_batches:
            _check_balance(self, workers, micro_batches)
        if self.ledger == "micro-batches" and (micro_batches or 0) > MOST_HASHED:
            raise PlacementError(
                f"A ledger of micro-batches has room for {MOST_HASHED} of them; the "
                f"recipe has {micro_batches:,}. Leave out `--ledger micro-batches`."
            )
        exchange, because = self._resolve_exchange(device)
        chosen = {"workers": workers, "device": device, "exchange": exchange}
        chosen["tensorboard"] = self._resolve_tensorboard()
        resolved = self.model_copy(update=chosen)
        return resolved, f"{_reason(workers, why, cores)}, exchange {because}"

    def _resolve_tensorboard(self) -> bool:
        is_installed = find_spec("tensorboardX") is not None
        if self.tensorboard and not is_installed:
            raise PlacementError(
                "TensorBoard events are written with tensorboardX, which is not "
                "installed. Install `samestep[tensorboard]`, or leave out "
                "`--tensorboard`."
            )
        return is_installed if self.tensorboard is None else self.tensorboard

    def _resolve_device(self, gpus: Callable[[], Gpus]) -> tuple[str, int, str]:
        """Return the device, its number of workers, and what limits that number."""
        available = Gpus() if self.device == "cpu" else gpus()
        if self.device == "cuda" and not available.names:
            raise PlacementError(
                f"`--device cuda` needs a GPU that PyTorch can use: {available.why}. "
                "Install a driver and PyTorch with CUDA, or use `--device cpu`."
            )
        if not available.names:
            return "cpu", *machine.usable_cores()
        _check_gpus(available.names, self.workers, self.exchange)
        return "cuda", len(available.names), "the GPUs that PyTorch sees"

    def _resolve_exchange(self, device: str) -> tuple[str, str]:
        if device == "cuda":
            if self.exchange == "shared":
                raise PlacementError(
                    "GPUs exchange over NCCL, or through the host with Gloo; received "
                    "`--exchange shared`. Leave it out; the result is the same."
                )
            if self.exchange == "gloo":
                return "gloo", "gloo through the host (untested: see docs/gpu.md)"
            return "nccl", "NCCL between GPUs (untested: see docs/gpu.md)"
        if self.exchange == "nccl":
            raise PlacementError(
                "The exchange `nccl` is for GPUs, and the device is the CPU. Use "
                "`--device cuda`, or another exchange; the CPU's give the same result."
            )
        if self.exchange == "gloo":
            return "gloo", "gloo (as asked for)"
        try:
            os.close(barrier.create(1))
        except OSError as error:
            if self.exchange == "shared":
                raise PlacementError(
                    f"The exchange `shared` needs shared memory: {error}. Use "
                    "`--exchange gloo`; the result is the same."
                ) from None
            return "gloo", f"gloo (no shared memory: {error})"
        return "shared", "shared memory"


def _check_balance(placement: Placement, workers: int, most: int) -> None:
    balance = placement.balance
    assert isinstance(balance, tuple)
    given = ",".join(map(str, balance))
    if len(balance) != workers or sum(balance) != most:
        raise PlacementError(
            f"A fixed balance gives each worker's number of micro-batches: {workers} "
            f"numbers that add up to {most}; received `{given}`. Change them, or use "
            "`--balance auto`."
        )
    if placement.drop_stragglers_below or placement.min_workers not in (None, workers):
        raise PlacementError(
            f"A fixed balance, here `{given}`, is for {workers} workers, and "
            "`--drop-stragglers-below` and `--min-workers` allow for fewer. Leave them "
            "out, or use `--balance auto`."
        )


def _check_gpus(names: Sequence[str], workers: int | str, exchange: str) -> None:
    if len(set(names)) > 1:
        raise PlacementError(
            "The GPUs of a training must be of one type, since others give other bits; "
            f"these are {'; '.join(sorted(set(names)))}. Choose with "
            "CUDA_VISIBLE_DEVICES."
        )
    if isinstance(workers, int) and workers > len(names) and exchange != "gloo":
        found = "1 GPU" if len(names) == 1 else f"{len(names)} GPUs"
        raise PlacementError(
            "NCCL connects GPUs, so each worker needs one of its own: there are "
            f"{workers} workers and {found}. Use `--workers {len(names)}`, or "
            "`--exchange gloo`, with which workers share GPUs; the result is the same."
        )


def _reason(workers: int, why: str, cores: int) -> str:
    count = "1 worker" if workers == 1 else f"{workers} workers"
    crowded = f"; they share {cores} cores" if workers > cores else ""
    return f"{count} ({why}{crowded})"
