"""TensorBoard events of a run, written by a tracker like any other.

The x axis is the step. A record of metrics.jsonl becomes one event, written whole and
at once, so the events end where metrics.jsonl ends, however the process does. A resumed
run begins another file, which first tells TensorBoard to forget the steps that are
taken again.
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
from samestep.system.atomic_files import append


LIBRARY = "tensorboardX"
Record = Mapping[str, Any]


class TensorBoard:
    """A tracker that writes event files into a directory."""

    def __init__(self, directory: Path) -> None:
        """The directory is made with the first event."""
        self._directory = directory
        self._step = 0
        self._waiting = b""
        with contextlib.suppress(Exception):  # which the first record meets again
            _library()  # now: no other tracker can be in the middle of importing it

    def __call__(self, record: Record) -> None:
        """A disk that fails for a while costs nothing. Raises OSError at the end."""
        kind = record["type"]
        if kind == "started":
            self._begin(record)
        elif kind == "step":
            steps = record["step"] - self._step
            self._step = record["step"]
            self._add_scalars(step_scalars(record, steps))
        elif kind == "epoch":  # its last step has been told
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
        again = {"status": "START"}
        self._add(self._step + 1, session_log=again)  # forget this step and later ones
        recipe = Recipe.from_dict(record["recipe"]).to_toml()
        self._add(self._step, summary={"value": [_text("recipe", recipe)]})

    def _add_scalars(self, scalars: Mapping[str, float]) -> None:
        values = [{"tag": tag, "simple_value": v} for tag, v in scalars.items()]
        if values:
            self._add(self._step, summary={"value": values})

    def _add(self, step: int, **what: Any) -> None:
        event = self._pb.Event(wall_time=time.time(), step=step, **what)
        self._waiting += self._framed(event.SerializeToString())
        with contextlib.suppress(OSError):  # of which metrics.jsonl tells a person
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            append(self._file, self._waiting)
            self._waiting = b""

    def _framed(self, data: bytes) -> bytes:
        """A TFRecord: uint64 length, its checksum, the data, its checksum."""
        length = struct.pack("<Q", len(data))
        return length + self._checksum(length) + data + self._checksum(data)

    def _checksum(self, data: bytes) -> bytes:
        """CRC-32C, rotated and shifted as the format has it."""
        crc = self._crc(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


MEANS = ("loss", "accuracy", "absolute_error")
"""Of the targets since the last record; which there are depends on the task."""


def step_scalars(record: Record, steps: int) -> dict[str, float]:
    """By tag; phases in seconds per step, as the mean over workers.

    `steps` are those since the record before.
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
    """`validation_loss` becomes `validation/loss`, and so on."""
    return {
        f"{split}/{key.removeprefix(f'{split}_')}": value
        for key, value in record.items()
        if key.startswith(f"{split}_") and isinstance(value, int | float)
    }


def _text(tag: str, text: str) -> dict[str, Any]:
    """Verbatim, in the Markdown that TensorBoard shows: indented by four spaces."""
    code = "".join(f"    {line}\n" for line in text.splitlines())
    return {
        "tag": tag,
        "metadata": {"plugin_data": {"plugin_name": "text"}},
        "tensor": {"dtype": "DT_STRING", "string_val": [code.encode()]},
    }


@functools.cache
def _library() -> tuple[Any, Callable[[bytes], int]]:
    """The messages and the checksum that tensorboardX brings."""
    with _without_init(LIBRARY):
        events = importlib.import_module(f"{LIBRARY}.proto.event_pb2")
        crc = importlib.import_module(f"{LIBRARY}.crc32c")
    return events, crc.crc32c


@contextlib.contextmanager
def _without_init(name: str) -> Iterator[None]:
    """Parts of a package can be imported without the package's own first lines.

    Those of tensorboardX import torch: 1.4 s and 186 MB, of which the supervisor needs
    nothing, instead of 12 ms and 1 MB.
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
