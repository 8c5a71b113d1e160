"""What a node holds of a training: its newest snapshot, or else its newest checkpoint.

    state/<host>/<generation>/memory       the two slots of `Snapshots`
                              about.json   what one needs to read them

The workers of a node map the file, so its pages outlive them, however they end, and the
next ones go on from there. One generation's directory is removed when the next has a
snapshot of its own.
"""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from samestep.config.model import Count
from samestep.config.recipe import Recipe
from samestep.errors import SamestepError
from samestep.output.run_writer import whole_lines
from samestep.state import checkpoint
from samestep.state.checkpoint import Checkpoint, ProgressEntry
from samestep.state.layout import Layout
from samestep.state.snapshot import Snapshots, State, num_bytes
from samestep.system import atomic_files, untrusted_files
from samestep.training.progress import Progress


DIRECTORY, MEMORY, ABOUT = "state", "memory", "about.json"
METRICS = "metrics.jsonl"
OF_TIME = ("seconds", "phases")
"""Of the progress; every machine measures its own."""


class StateInfo(BaseModel):
    """The content of about.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    recipe: dict[str, Any]
    build: dict[str, str]
    """What decides bits besides the recipe."""
    layout: Layout
    workers: Annotated[int, Field(ge=1, le=1 << 16)]
    steps_per_epoch: Count


@dataclass(frozen=True)
class Held:
    """A state, the conditions under which it came about, and its record."""

    state: State
    layout: Layout
    recipe: Recipe
    build: dict[str, str]
    epochs: list[dict[str, Any]]
    """Of the complete epochs."""
    metrics: str
    """The lines of metrics.jsonl."""

    @property
    def checksum(self) -> int:
        """CRC-32 of all that the next steps depend on: not of what time was spent."""
        checksum = 0
        for row in (self.state.parameters, *self.state.states):
            for _, view in self.layout.parameter_views(row):
                checksum = zlib.crc32(view.tobytes(), checksum)
        checksum = zlib.crc32(self.state.tail.tobytes(), checksum)
        progress = Progress.from_dict(self.state.progress).to_dict()
        kept = {name: progress[name] for name in progress if name not in OF_TIME}
        return zlib.crc32(json.dumps(_as_floats(kept)).encode(), checksum)


def newest(run: Path) -> Held | None:
    """The newest state in a run directory; None: it has none.

    Raises RunError, OSError.
    """
    if run.exists():
        untrusted_files.check_parts(run)
    found = [*_snapshots(run), *_checkpoints(run)]
    return max(found, key=lambda held: held.state.step, default=None)


def _checkpoints(run: Path) -> Iterator[Held]:
    for _, found in checkpoint.newest_valid(checkpoint.directory_of(run)):
        if isinstance(found, Checkpoint):
            manifest = found.manifest
            yield Held(
                found.state,
                manifest.layout,
                Recipe.from_dict(manifest.recipe, warn=False),
                manifest.build,
                manifest.epochs,
                _metrics(run),
            )


def _snapshots(run: Path) -> Iterator[Held]:
    """Those whose record is complete: lines may be lost that the disk did not take."""
    metrics = _metrics(run)
    epochs = epochs_in(metrics)
    for file in (run / DIRECTORY).glob(f"*/*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError, KeyError, SamestepError):
            about = StateInfo.model_validate_json(file.read_bytes())
            state = _read(file.parent / MEMORY, about)
            complete = state.step // about.steps_per_epoch if state else 0
            if state is not None and complete <= len(epochs):
                recipe = Recipe.from_dict(about.recipe, warn=False)
                layout, build = about.layout, about.build
                yield Held(state, layout, recipe, build, epochs[:complete], metrics)


def _read(memory: Path, about: StateInfo) -> State | None:
    fd = os.open(memory, os.O_RDWR)
    try:
        if os.fstat(fd).st_size < num_bytes(about.layout, about.workers):
            return None  # or it would be made as large as is claimed
        state = Snapshots(fd, about.layout, about.workers).newest()
    finally:
        os.close(fd)
    if state is not None:
        ProgressEntry.model_validate(state.progress)
    return state


def _as_floats(value: Any) -> Any:
    """Files turn a whole number into an int, or keep it a float."""
    if isinstance(value, dict):
        return {name: _as_floats(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_floats(each) for each in value]
    return float(value) if isinstance(value, int) else value


def _metrics(run: Path) -> str:
    """Up to the first line that is damaged: what follows has lost its epoch."""
    return "".join(takewhile(_is_record, whole_lines(run / METRICS)))


def _is_record(line: str) -> bool:
    try:
        return isinstance(untrusted_files.parse_json(line), dict)
    except ValueError:
        return False


def epochs_in(metrics: str) -> list[dict[str, Any]]:
    """The epochs' records, as in result.json."""
    epochs = []
    for line in metrics.splitlines():
        record = json.loads(line)
        if record.pop("type", None) == "epoch":
            record.pop("at", None)
            epochs.append(record)
    return epochs


@dataclass(frozen=True)
class SnapshotDirectory:
    """Where one generation of a node keeps its snapshots."""

    path: Path

    @classmethod
    def create(cls, run: Path, host: str, generation: int) -> "SnapshotDirectory":
        """Raises OSError."""
        path = run / DIRECTORY / host / str(generation)
        shutil.rmtree(path, ignore_errors=True)  # of one that ended before it began
        path.mkdir(parents=True)
        return cls(path)

    @property
    def memory(self) -> Path:
        """The file that the workers map."""
        return self.path / MEMORY

    def open(self) -> int:
        """The descriptor of the memory. Raises OSError."""
        return os.open(self.memory, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def describe(self, about: StateInfo) -> None:
        """From now on its snapshots can be found; older ones go. Raises OSError."""
        atomic_files.write(self.path / ABOUT, about.model_dump_json().encode())
        for other in self.path.parent.iterdir():
            if other != self.path:
                shutil.rmtree(other, ignore_errors=True)

    def remove_all(self) -> None:
        """The run is finished, and its last state is a checkpoint."""
        shutil.rmtree(self.path.parent.parent, ignore_errors=True)
