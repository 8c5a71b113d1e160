"""The newest state of a training on one node: a snapshot, or else a checkpoint.

    state/<host>/<generation>/memory       the two slots of `Snapshots`
                              about.json   their layout and conditions

The workers of a node map the file, so its pages outlive them, however they end, and the
next generation continues from it. The directory of a generation is removed when the
next one has a snapshot.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from samestep.config.recipe import Recipe
from samestep.core.progress import Progress
from samestep.errors import SamestepError
from samestep.files import atomic, untrusted
from samestep.output import ledger
from samestep.output.json_lines import whole_lines
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State, num_bytes
from samestep.system.json_values import JsonObject


DIRECTORY, MEMORY, ABOUT = "state", "memory", "about.json"
METRICS = "metrics.jsonl"
OF_MACHINES = ("seconds", "phases", "micro_batch_hashes")
"""Fields of the progress that decide nothing: what every machine measures for itself,
and which worker computed what."""


class StateInfo(BaseModel):
    """The content of about.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: JsonObject
    build: dict[str, str]
    """Everything that decides bits besides the recipe."""
    layout: Layout
    workers: Annotated[int, Field(ge=1, le=1 << 16)]


@dataclass(frozen=True)
class Held:
    """A state, the conditions under which it was computed, and the record so far."""

    state: State
    layout: Layout
    recipe: Recipe
    build: dict[str, str]
    epochs: list[JsonObject]
    """The records of the complete epochs."""
    metrics: str
    """The lines of metrics.jsonl."""
    ledgers: Mapping[str, bytes] = field(default_factory=dict)
    """The content of the run's ledgers, by their file names."""

    @property
    def recorded(self) -> dict[str, str]:
        """A SHA-256 of all steps in each ledger; empty if it lacks some of them."""
        progress = Progress.model_validate(self.state.progress)
        latest = progress.hashes, progress.micro_batch_hashes
        columns = ledger.columns(self.recipe.micro_batches)
        return {
            name: ledger.digest_at(
                self.ledgers[name], columns[name], progress.step, hashes
            )
            for name, hashes in zip(ledger.FILES, latest, strict=True)
            if name in self.ledgers
        }

    @property
    def checksum(self) -> int:
        """CRC-32 of everything that the next steps depend on."""
        checksum = 0
        for row in (self.state.parameters, *self.state.states):
            for _, view in self.layout.parameter_views(row):
                checksum = zlib.crc32(view.tobytes(), checksum)
        checksum = zlib.crc32(self.state.tail.tobytes(), checksum)
        progress = Progress.model_validate(self.state.progress).model_dump()
        kept = {name: progress[name] for name in progress if name not in OF_MACHINES}
        return zlib.crc32(json.dumps(_as_floats(kept)).encode(), checksum)


def newest(run: Path) -> Held | None:
    """Return the newest state in a run directory, or None.

    Raises RunError, OSError.
    """
    if run.exists():
        untrusted.check_parts(run)
    metrics = _metrics(run)
    states = [*_snapshots(run, metrics), *_checkpoints(run, metrics)]
    held = max(states, key=lambda held: held.state.step, default=None)
    files = [name for name in ledger.FILES if (run / name).exists()]
    ledgers = {name: untrusted.read_bytes(run / name) for name in files}
    return held and replace(held, ledgers=ledgers)


def _checkpoints(run: Path, metrics: str) -> Iterator[Held]:
    for _, read in checkpoint.newest_valid(checkpoint.directory_of(run)):
        if isinstance(read, Checkpoint):
            manifest = read.manifest
            yield Held(
                read.state,
                manifest.layout,
                Recipe.from_dict(manifest.recipe, warn=False),
                manifest.build,
                manifest.epochs,
                metrics,
            )


def _snapshots(run: Path, metrics: str) -> Iterator[Held]:
    """Yield snapshots whose record is complete: a full disk may have lost lines."""
    epochs = _epochs_in(metrics)
    for file in (run / DIRECTORY).glob(f"*/*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError, KeyError, SamestepError):
            about = StateInfo.model_validate_json(file.read_bytes())
            state = _read(file.parent / MEMORY, about)
            complete = state.epochs if state else 0
            if state is not None and complete <= len(epochs):
                recipe = Recipe.from_dict(about.recipe, warn=False)
                layout, build = about.layout, about.build
                yield Held(state, layout, recipe, build, epochs[:complete], metrics)


def _read(memory: Path, about: StateInfo) -> State | None:
    fd = os.open(memory, os.O_RDWR)
    try:
        if os.fstat(fd).st_size < num_bytes(about.layout, about.workers):
            return None  # mapping it would extend the file to the size it claims
        state = Snapshots(fd, about.layout, about.workers).newest()
    finally:
        os.close(fd)
    if state is not None:
        Progress.model_validate(state.progress)
    return state


def _as_floats(value: Any) -> Any:
    """Return all numbers as floats: JSON may turn a whole float into an int."""
    if isinstance(value, dict):
        return {name: _as_floats(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(each) for each in value]
    return float(value) if isinstance(value, int) else value


def _metrics(run: Path) -> str:
    """Return the lines before the first damaged one: later ones lack their epoch."""
    return "".join(takewhile(_is_record, whole_lines(run / METRICS)))


def _is_record(line: str) -> bool:
    try:
        return isinstance(untrusted.parse_json(line), dict)
    except ValueError:
        return False


def _epochs_in(metrics: str) -> list[JsonObject]:
    """Return the records of the epochs, as in result.json."""
    records = map(json.loads, metrics.splitlines())
    epochs = [record for record in records if record.get("type") == "epoch"]
    left_out = "type", "at"
    return [{k: v for k, v in epoch.items() if k not in left_out} for epoch in epochs]


def make_directory(run: Path, host: str, generation: int) -> Path:
    """Make the directory in which one generation of a node keeps its snapshots."""
    path = run / DIRECTORY / host / str(generation)
    # A generation of this number may have ended before its first snapshot.
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def open_memory(directory: Path) -> int:
    """Open the file that the workers map; return its descriptor. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    return os.open(directory / MEMORY, flags, 0o600)


def describe(directory: Path, about: StateInfo) -> None:
    """Make the snapshots readable, and remove older generations. Raises OSError."""
    atomic.write(directory / ABOUT, about.model_dump_json().encode())
    for other in directory.parent.iterdir():
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)
