"""Writes TensorBoard events of a run, as a tracker.

The x axis is the step. Each record of metrics.jsonl becomes one event, which is written
completely and at once, so the events end where metrics.jsonl ends. A resumed run begins
another file, which first tells TensorBoard to forget the steps that are repeated.
"""

import contextlib
import functools
import importlib
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from samestep.config.recipe import Recipe
from samestep.files.atomic import append


LIBRARY = "tensorboardX"
Record = Mapping[str, Any]


class TensorBoard:
    """A tracker that writes event files into a directory."""

    def __init__(self, directory: Path) -> None:
        """Prepare a tracker; the directory is made with the first event."""
        self._directory = directory
        self._step = 0
        self._waiting = b""
        # Now, while no other tracker can be in the middle of importing it. An error
        # comes again with the first record, which reports it.
        with contextlib.suppress(Exception):
            _library()

    def __call__(self, record: Record) -> None:
        """Write a record. A failing disk is tried again; raises OSError at the end."""
        kind = record["type"]
        if kind == "started":
            self._begin(record)
        elif kind == "step":
            steps = record["step"] - self._step
            self._step = record["step"]
            self._add_scalars(step_scalars(record, steps))
        elif kind in ("epoch", "evaluation"):  # after the record of its last step
            self._add_scalars(split_scalars(record, "validation"))
        else:
            self._add_scalars(split_scalars(record, "test"))
            self._flush()

    def _begin(self, record: Record) -> None:
        self._pb, self._crc = _library()
        self._directory.mkdir(exist_ok=True)
        self._file = self._directory / f"events.out.tfevents.{time.time():.6f}.samestep"
        self._step = record["step"]
        self._add(0, file_version="brain.Event:2")
        # TensorBoard then forgets this step and later ones.
        self._add(self._step + 1, session_log={"status": "START"})
        recipe = Recipe.from_dict(record["recipe"]).to_toml()
        self._add(self._step, summary={"value": [_text("recipe", recipe)]})

    def _add_scalars(self, scalars: Mapping[str, float]) -> None:
        values = [{"tag": tag, "simple_value": v} for tag, v in scalars.items()]
        if values:
            self._add(self._step, summary={"value": values})

    def _add(self, step: int, **fields: Any) -> None:
        event = self._pb.Event(wall_time=time.time(), step=step, **fields)
        self._waiting += self._framed(event.SerializeToString())
        with contextlib.suppress(OSError):  # the run's own files lead to a warning
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            append(self._file, self._waiting)
            self._waiting = b""

    def _framed(self, data: bytes) -> bytes:
        """Return a TFRecord: uint64 length, its checksum, the data, its checksum."""
        length = struct.pack("<Q", len(data))
        return length + self._checksum(length) + data + self._checksum(data)

    def _checksum(self, data: bytes) -> bytes:
        """Return the CRC-32C, rotated and shifted as the TFRecord format asks."""
        crc = self._crc(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


MEANS = ("loss", "accuracy", "absolute_error")
"""Means over the targets since the last record, as far as the task has them."""


def step_scalars(record: Record, steps: int) -> dict[str, float]:
    """Return scalars by tag; phases are in seconds per step, as mean over workers.

    `steps` is the number of steps since the record before.
    """
    workers, names = record["workers"], (*MEANS, *record.get("own_metrics", ()))
    scalars: dict[str, float | None] = {
        **{f"train/{name}": record[name] for name in names if name in record},
        "lr": record["lr"],
        "samples_per_second": record["samples_per_second"],
        "noise_scale": record.get("noise_scale"),
    }
    for phase in workers[0]:
        mean = sum(seconds[phase] for seconds in workers) / len(workers)
        scalars[f"phases/{phase}"] = mean / steps
    for rank, seconds in enumerate(workers):
        total = sum(seconds.values())
        scalars[f"waiting/worker-{rank}"] = seconds["wait"] / total if total else None
    return {tag: value for tag, value in scalars.items() if value is not None}


def split_scalars(record: Record, split: str) -> dict[str, float]:
    """Return the scalars of a split; `validation_loss` becomes `validation/loss`."""
    return {
        f"{split}/{key.removeprefix(f'{split}_')}": value
        for key, value in record.items()
        if key.startswith(f"{split}_") and isinstance(value, int | float)
    }


def _text(tag: str, text: str) -> dict[str, Any]:
    """Return a text as a block of code, which Markdown indents by four spaces."""
    code = "".join(f"    {line}\n" for line in text.splitlines())
    return {
        "tag": tag,
        "metadata": {"plugin_data": {"plugin_name": "text"}},
        "tensor": {"dtype": "DT_STRING", "string_val": [code.encode()]},
    }


@functools.cache
def _library() -> tuple[Any, Callable[[bytes], int]]:
    """Import the messages and the checksum of tensorboardX."""
    with _without_init(LIBRARY):
        events = importlib.import_module(f"{LIBRARY}.proto.event_pb2")
        crc = importlib.import_module(f"{LIBRARY}.crc32c")
    return events, crc.crc32c


@contextlib.contextmanager
def _without_init(name: str) -> Iterator[None]:
    """Allow to import parts of a package without running its `__init__`.

    That of tensorboardX imports torch, which the supervisor must not: it would cost
    1.4 s and 186 MB instead of 12 ms and 1 MB. Python looks into sys.modules for the
    package, so an empty one stands there meanwhile.
    """
    if name in sys.modules:
        yield
        return
    spec = find_spec(name)
    assert spec is not None  # as Placement.resolve has checked
    package: ModuleType = module_from_spec(spec)
    sys.modules[name] = package
    try:
        yield
    finally:
        del sys.modules[name]
