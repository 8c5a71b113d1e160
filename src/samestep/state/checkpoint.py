"""A training on disk: `checkpoints/step-<n>/` with three files.

    model.safetensors       parameters and buffers by name; the recipe as metadata
    optimizer.safetensors   the optimizer's states, `<state>/<parameter>`, and likewise
                            an average of the weights and those of the best epoch
    manifest.json           position, metrics so far, layout, conditions, the size and
                            SHA-256 of the other two, and a digest of all this

A checkpoint is written under a temporary name, flushed, and renamed, so one that has
its name is complete unless it was damaged later. Nothing in it is ever executed:
JSON is checked against a schema, tensors against the manifest. No torch is needed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from samestep.config.recipe import Recipe
from samestep.core.progress import Count, Progress
from samestep.errors import CheckpointError
from samestep.files import atomic, untrusted
from samestep.state.layout import AVERAGE, BEST, Floats, Layout
from samestep.state.snapshot import State
from samestep.system.json_values import JsonObject


MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
MANIFEST: Final = "manifest.json"
MOST_MANIFEST_BYTES = 64 << 20
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Section):
    """Size and digest that a file must have."""

    bytes: Count
    sha256: Sha256


class Manifest(_Section):
    """The content of manifest.json."""

    format: Literal[2] = 2
    epoch: Count
    """Complete epochs."""
    progress: Progress
    epochs: list[JsonObject]
    """The records of the complete epochs, as in result.json."""
    recipe: JsonObject
    recipe_digest: Sha256
    build: dict[str, str]
    """Conditions besides the recipe that decide bits, such as the version of torch."""
    layout: Layout
    files: dict[Literal["model.safetensors", "optimizer.safetensors"], FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A state and everything needed to go on from it."""

    manifest: Manifest
    state: State


def directory_of(run: Path) -> Path:
    """Return the directory of a run's checkpoints."""
    return run / "checkpoints"


def steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, oldest first."""
    names = [path.name for path in directory.glob("step-*")]
    return sorted(int(n[5:]) for n in names if n[5:].isdecimal() and n[5:].isascii())


def path_of(directory: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, `step-<n>`."""
    return directory / f"step-{step}"


def model_bytes(state: State, layout: Layout, recipe: Recipe) -> bytes:
    """Return a file of weights: safetensors with the recipe as metadata."""
    tensors: dict[str, NDArray[Any]] = dict(layout.parameter_views(state.parameters))
    tensors |= layout.buffer_views(state.tail[: layout.tail])
    counts = state.progress["counts"]
    tensors |= {
        name: np.array(count, np.int64)
        for name, count in zip(layout.counters, counts, strict=True)
    }
    tensors |= {name: state.constants[name] for name in layout.constants}
    tensors |= {name: tensors[first] for name, first in layout.aliases.items()}
    # One entry only: safetensors writes several in an order that changes.
    return safetensors.numpy.save(tensors, {"recipe": json.dumps(recipe.to_dict())})


def result_of(state: State, layout: Layout) -> State:
    """Return the state with the weights that a finished training gives.

    They are those of the best epoch, or their average, or the last ones.
    """
    rows = dict(zip(layout.states, state.states, strict=True))
    if BEST in rows:
        counts = state.progress["stopping"]["counts"]
        return replace(
            state,
            parameters=rows[BEST],
            tail=state.tail[layout.tail :],
            progress=state.progress | {"counts": counts},
        )
    return replace(state, parameters=rows.get(AVERAGE, state.parameters))


def write(
    directory: Path,
    state: State,
    layout: Layout,
    recipe: Recipe,
    build: Mapping[str, str],
    epochs: list[JsonObject],
) -> Path:
    """Write a new checkpoint and return its path.

    Raises OSError, and leaves nothing behind.
    """
    contents = {
        MODEL: model_bytes(state, layout, recipe),
        OPTIMIZER: safetensors.numpy.save(dict(_state_views(state, layout))),
    }
    manifest = Manifest(
        epoch=len(epochs),
        progress=Progress.model_validate(state.progress),
        epochs=epochs,
        recipe=recipe.to_dict(),
        recipe_digest=recipe.digest,
        build=dict(build),
        layout=layout,
        files={name: _entry(content) for name, content in contents.items()},  # type: ignore[misc]
    )
    fields = manifest.model_dump(mode="json")
    fields["digest"] = digest_of(fields)
    text = json.dumps(fields, indent=1) + "\n"
    final = path_of(directory, state.step)
    temporary = directory / f".{final.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in {**contents, MANIFEST: text.encode()}.items():
            atomic.write_through(temporary / name, content)
        atomic.flush_directory(temporary)
        outdated = directory / f".{final.name}.{os.getpid()}.old.tmp"
        if final.exists():  # damaged, or from before other bits were accepted
            final.rename(outdated)
        temporary.rename(final)
        atomic.flush_directory(directory)
        shutil.rmtree(outdated, ignore_errors=True)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path) -> Checkpoint:
    """Return a checkpoint, all of it checked. Raises CheckpointError, OSError."""
    manifest = read_manifest(path)
    layout = manifest.layout
    try:
        model, optimizer = (
            _tensors(path / name, manifest.files[name]) for name in (MODEL, OPTIMIZER)
        )
    except KeyError as error:
        raise _damaged(path, f"its manifest does not list {error}") from None
    _check_size(path, layout, len(optimizer), manifest.files[MODEL].bytes)
    size, states = layout.size, len(layout.states)
    state = State(
        _progress(manifest).model_dump(),
        np.zeros(size, layout.dtype),
        np.zeros((states, size), layout.dtype),
        np.zeros(layout.kept_tail, layout.dtype),
    )
    wanted: dict[str, Floats] = dict(layout.parameter_views(state.parameters))
    wanted |= layout.buffer_views(state.tail[: layout.tail])
    state.constants = {n: model.pop(n) for n in layout.constants if n in model}
    for name in layout.aliases:
        model.pop(name, None)
    _fill(wanted, model, set(layout.counters), path / MODEL)
    _fill(_state_views(state, layout), optimizer, set(), path / OPTIMIZER)
    counts = [int(model[name]) for name in layout.counters]
    if counts != manifest.progress.counts:
        raise _damaged(path, "its integer buffers are not those of its manifest")
    return Checkpoint(manifest, state)


def _progress(manifest: Manifest) -> Progress:
    """Return the progress; older manifests only have records of complete epochs."""
    progress, epochs = manifest.progress, len(manifest.epochs)
    if "epochs" in progress.model_fields_set:
        return progress
    return progress.model_copy(update={"epochs": epochs})


def _check_size(path: Path, layout: Layout, entries: int, model_bytes: int) -> None:
    """Raise CheckpointError if the files cannot hold what the manifest claims.

    A forged one must not make us reserve memory for it.
    """
    expected = len(layout.states) * len(layout.parameters)
    expected += len(layout.buffers) if BEST in layout.states else 0
    elements = sum(entry.numel for entry in (*layout.parameters, *layout.buffers))
    if entries != expected or 4 * elements > model_bytes:
        raise _damaged(path, "its tensors are not those of the layout")


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint. Raises CheckpointError, OSError."""
    file = path / MANIFEST
    if file.is_symlink() or path.is_symlink():
        raise _damaged(path, "it is a symbolic link")
    try:
        fields = untrusted.parse_json(untrusted.read_bytes(file, MOST_MANIFEST_BYTES))
    except ValueError as error:
        raise _damaged(path, f"{MANIFEST} is not JSON: {error}") from None
    if not isinstance(fields, dict) or fields.pop("digest", None) != digest_of(fields):
        raise _damaged(path, f"{MANIFEST} does not have the digest that it names")
    try:
        manifest = Manifest.model_validate(fields)
        recipe = Recipe.from_dict(manifest.recipe, warn=False)
    except ValueError as error:
        first = str(error).splitlines()[:3]
        raise _damaged(path, f"{MANIFEST} is not valid: {' '.join(first)}") from None
    if recipe.digest != manifest.recipe_digest:
        raise _damaged(path, "its recipe does not have the digest that it names")
    return manifest


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest's canonical JSON text without its `digest`."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensors(file: Path, entry: FileEntry) -> dict[str, NDArray[Any]]:
    if file.is_symlink():
        raise _damaged(file, "it is a symbolic link")
    size = file.stat().st_size
    if size != entry.bytes:
        raise _damaged(file, f"it has {size} bytes instead of {entry.bytes}")
    content = untrusted.read_bytes(file, size)
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise _damaged(file, "its SHA-256 is not the one in the manifest")
    try:
        tensors: dict[str, NDArray[Any]] = safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, f"it is not a safetensors file: {error}") from None
    return tensors


def _fill(
    wanted: Mapping[str, Floats],
    tensors: Mapping[str, Any],
    counters: set[str],
    file: Path,
) -> None:
    """Copy a file's tensors to the wanted places. Raises CheckpointError."""
    if tensors.keys() != wanted.keys() | counters:
        raise _damaged(file, "its tensors are not those of the layout")
    for name, view in wanted.items():
        tensor = tensors[name]
        if tensor.shape != view.shape or tensor.dtype != view.dtype:
            raise _damaged(file, f"{name} is {tensor.dtype}{list(tensor.shape)}")
        view[...] = tensor
    for name in counters:
        if tensors[name].shape != () or tensors[name].dtype != np.int64:
            raise _damaged(file, f"{name} is not one int64")


def _state_views(state: State, layout: Layout) -> dict[str, Floats]:
    views = {
        f"{name}/{parameter}": view
        for name, row in zip(layout.states, state.states, strict=True)
        for parameter, view in layout.parameter_views(row)
    }
    if BEST in layout.states:
        best = layout.buffer_views(state.tail[layout.tail :])
        views |= {f"{BEST}/{name}": view for name, view in best}
    return views


def _entry(content: bytes) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint {path} cannot be used: {why}.")


def newest_valid(
    directory: Path, before: int | None = None
) -> Iterator[tuple[int, Checkpoint | str]]:
    """Yield each step and its checkpoint, or why it cannot be used; the newest first.

    Only those `before` a step, if one is given. Ends after the first that can be used.
    """
    for step in reversed(steps(directory)):
        if before is not None and step >= before:
            continue
        try:
            checkpoint = load(path_of(directory, step))
            if checkpoint.state.step != step:
                raise _damaged(path_of(directory, step), "it is of another step")
        except (CheckpointError, OSError) as error:
            yield step, str(error)
        else:
            yield step, checkpoint
            return
