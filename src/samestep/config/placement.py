"""The placement: everything about a training that must not change its result."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from samestep.errors import PlacementError, warn_old_name
from samestep.system import barrier, machine
from samestep.system.machine import Gpus


Counts = tuple[Annotated[int, Field(ge=0)], ...]
RENAMED = {"evict_slower_than": "drop_stragglers_below"}
"""Fields that keep their old name for one release."""


class Placement(BaseModel):
    """Where and with what a recipe is trained."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Processes that compute gradients; auto: the physical cores that may be used."""
    device: Literal["cpu", "auto", "cuda"] = "cpu"
    """What the workers compute on; auto: GPUs if there are any. A GPU has other bits
    than a CPU, as another type of CPU has: so it is only used if asked for."""
    exchange: Literal["auto", "shared", "gloo", "nccl"] = "auto"
    """How the workers' partial gradients become one sum; auto: shared if possible, nccl
    between GPUs."""
    hang_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds after which a worker that others wait for counts as hung; they count from
    the first step on."""
    start_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """The same for each part of what comes before the first step: to load the data, to
    build the model, to compile it. A worker that is stopped by a signal is noticed
    after `hang_timeout` there, too."""
    balance: Literal["auto", "off", "random"] | Counts = "auto"
    """Who owns how many micro-batches: by measured speed (auto), evenly (off), as given
    for each worker, or another ownership at every step (random: to show that it does
    not matter)."""
    drop_stragglers_below: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Go on without a worker that is slower than this share of the others' median."""
    min_workers: Annotated[int, Field(ge=1)] | None = None
    """After a failure, go on with as few as this if the machine has lost cores or
    memory; by default never with fewer."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """How often to start again without getting further in between."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Between two checkpoints on disk, besides those at the end of an epoch."""
    snapshot_seconds: Annotated[float, Field(ge=0)] = 0.5
    """Between two snapshots in memory; 0: none, and no checkpoint but the last."""
    prefetch: Literal["auto", "off"] = "auto"
    """Whether each worker gets a helper that draws its samples ahead of time, if that
    takes more than a tenth of a step."""
    probe: bool = True
    """Whether trainings with own code are probed: at the start and after each epoch,
    one micro-batch is computed again, by every worker and by another process."""
    profile: Annotated[int, Field(ge=0, le=1000)] = 0
    """Steps of which every phase of every worker is written to trace.json."""
    tensorboard: bool | None = None
    """Write TensorBoard events into the run directory; None: if tensorboardX is
    installed."""
    out: Path | None = Field(None, strict=False)
    """The run directory; by default runs/<recipe>-<UTC time>."""

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, fields: Any) -> Any:
        if not isinstance(fields, Mapping):
            return fields
        for old in RENAMED.keys() & fields.keys():
            warn_old_name(old, RENAMED[old])
        return {RENAMED.get(name, name): value for name, value in fields.items()}

    @property
    def num_workers(self) -> int:
        """Of a resolved placement."""
        assert isinstance(self.workers, int)
        return self.workers

    def resolve(
        self, micro_batches: int | None, gpus: Callable[[], Gpus] = Gpus
    ) -> tuple["Placement", str]:
        """Every `auto` replaced by what was chosen, and the reason in words.

        At most `micro_batches` workers can share them; None: any number will do.
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
        """The device, how many workers it has room for, and what limits them."""
        found = Gpus() if self.device == "cpu" else gpus()
        if self.device == "cuda" and not found.names:
            raise PlacementError(
                f"`--device cuda` needs a GPU that PyTorch can use: {found.why}. "
                "Install a driver and PyTorch with CUDA, or use `--device cpu`."
            )
        if not found.names:
            return "cpu", *machine.usable_cores()
        _check_gpus(found.names, self.workers)
        return "cuda", len(found.names), "the GPUs that PyTorch sees"

    def _resolve_exchange(self, device: str) -> tuple[str, str]:
        if device == "cuda":
            if self.exchange not in ("auto", "nccl"):
                raise PlacementError(
                    f"GPUs exchange over NCCL; received `--exchange {self.exchange}`. "
                    "Leave it out; the result is the same."
                )
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
            f"A fixed balance has the micro-batches of each worker: {workers} numbers "
            f"that add up to {most}; received `{given}`. Use "
            "`--balance auto` to have them chosen."
        )
    if placement.drop_stragglers_below or placement.min_workers not in (None, workers):
        raise PlacementError(
            f"A fixed balance, here `{given}`, is for {workers} workers, and "
            "`--drop-stragglers-below` and `--min-workers` allow for fewer. Leave them "
            "out, or use `--balance auto`."
        )


def _check_gpus(names: Sequence[str], workers: int | str) -> None:
    if len(set(names)) > 1:
        raise PlacementError(
            "GPUs of one training are of one type, since another has other bits; found "
            f"{'; '.join(sorted(set(names)))}. Choose with CUDA_VISIBLE_DEVICES."
        )
    if isinstance(workers, int) and workers > len(names):
        raise PlacementError(
            f"Every worker has a GPU of its own: {workers} workers need as many, and "
            f"there are {len(names)}. Use `--workers {len(names)}`; the result is the "
            "same."
        )


def _reason(workers: int, why: str, cores: int) -> str:
    count = "1 worker" if workers == 1 else f"{workers} workers"
    crowded = f"; they share {cores} cores" if workers > cores else ""
    return f"{count} ({why}{crowded})"
