"""A whole training as one file, for the runner in csrc/runner, which needs no Python.

All numbers are little-endian; arrays follow the header without gaps, and the file ends
with the last one. `csrc/runner/runner.h` has the same as C structures.

| part | type |
|---|---|
| `SAMESTEP`, then the fields of `HEADER` | 8 bytes, int64 each |
| operations; sizes of buffers, of which constant | `OPERATION`; int64 [buffers] twice |
| constants of all buffers; merges | float32; int64 [micro-batches] |
| parameters; running statistics; what training does not change | float32 |
| data [rows, features] | uint8, float32, or tokens int64 |
| targets | int64 [rows] or [rows, positions], or float32 [rows, values] |
| groups: start, size; pieces: source, start, size; text | int64; int64; bytes |
| steps | `step_type` |

Pieces say what the fingerprint consists of: ranges of the text or of a vector.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samestep.errors import DataError
from samestep.files import atomic, untrusted
from samestep.kernels.interface import SPECIFICATION, Optimizer
from samestep.kernels.program import OPERATION, PANEL, Program


MAGIC = b"SAMESTEP"
VERSION = 3
HEADER = (
    *("version", "specification", "ops", "buffers", "constants", "capacity"),
    *("micro_batches", "parameters", "running", "tail", "rows", "features"),
    *("element", "values", "positions", "fixed", "groups", "pieces", "text", "steps"),
)
MOST = 1 << 28
"""The largest number in a header."""
OPTIMIZER = np.dtype(Optimizer)
_KINDS = {1: "u1", 4: "<f4", 8: "<i8"}
"""The types of data, by the bytes of an element."""


class Source(IntEnum):
    """What a piece of the fingerprint is a range of."""

    TEXT = 0
    PARAMETERS = 1
    RUNNING = 2
    AVERAGE = 3


class Averaging(IntEnum):
    """What a step does with the average of the weights."""

    NONE = 0
    BEGINS = 1
    MOVES = 2


def step_type(micro_batches: int, capacity: int, groups: int) -> np.dtype[np.void]:
    """Return the type of a step: its samples, and the numbers of its update.

    The gradient is multiplied by `factor`, then clipped unless `max_norm` is 0. Only
    the first `samples` indices count.
    """
    return np.dtype(
        [
            ("samples", "<i8"),
            ("max_norm", "<f8"),
            ("weight", "<f4"),
            ("average_weight", "<f4"),
            ("average", "<i4"),
            ("factor", "<f4"),
            ("starts", "<i8", micro_batches + 1),
            ("keys", "<u8", micro_batches),
            ("indices", "<i8", capacity),
            ("optimizers", OPTIMIZER, groups),
        ]
    )


def buffers_of(
    program: Program, capacity: int, micro_batches: int
) -> dict[str, NDArray[Any]]:
    """Return what a `ProgramFile` says of a program and its buffers, by name."""
    buffers = program.buffers
    return {
        "ops": program.encoded(),
        "sizes": np.array([b.size(capacity, micro_batches) for b in buffers], "<i8"),
        "constant_sizes": np.array([len(b.constant) for b in buffers], "<i8"),
        "constants": np.array([x for b in buffers for x in b.constant], "<f4"),
        "fixed": _fixed(program),
    }


def _fixed(program: Program) -> NDArray[np.float32]:
    if program.constants is None:
        return np.zeros(0, np.float32)
    return np.asarray(program.constants.numpy(), np.float32)


@dataclass(frozen=True, kw_only=True)
class ProgramFile:
    """The parts of a file; the table above has their types."""

    ops: NDArray[np.void]
    sizes: NDArray[np.int64]
    constant_sizes: NDArray[np.int64]
    constants: NDArray[np.float32]
    capacity: int
    tail: int
    merges: NDArray[np.int64]
    parameters: NDArray[np.float32]
    running: NDArray[np.float32]
    fixed: NDArray[np.float32]
    data: NDArray[np.uint8] | NDArray[np.float32] | NDArray[np.int64]
    targets: NDArray[np.int64] | NDArray[np.float32]
    groups: NDArray[np.int64]
    pieces: NDArray[np.int64]
    text: bytes
    steps: NDArray[np.void]

    def header(self) -> dict[str, int]:
        """Return the numbers of the header, by the names in `HEADER`."""
        is_float = self.targets.dtype.kind == "f"
        return {
            "version": VERSION,
            "specification": SPECIFICATION,
            "ops": len(self.ops),
            "buffers": len(self.sizes),
            "constants": len(self.constants),
            "capacity": self.capacity,
            "micro_batches": len(self.merges),
            "parameters": len(self.parameters),
            "running": len(self.running),
            "tail": self.tail,
            "rows": len(self.data),
            "features": self.data.shape[1],
            "element": self.data.itemsize,
            "values": self.targets.shape[1] if is_float else 0,
            "positions": int(np.prod(self.targets.shape[1:])) if not is_float else 1,
            "fixed": len(self.fixed),
            "groups": len(self.groups),
            "pieces": len(self.pieces),
            "text": len(self.text),
            "steps": len(self.steps),
        }

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. Raises OSError."""
        header = self.header()
        parts = [MAGIC, struct.pack(f"<{len(HEADER)}q", *header.values())]
        for name, kind, shape in _arrays(header):
            array = getattr(self, name)
            if name == "text":
                array = np.frombuffer(array, np.uint8)
            assert array.shape == shape, (name, array.shape, shape)
            parts.append(np.ascontiguousarray(array, kind).tobytes())
        atomic.write(path, b"".join(parts))

    @classmethod
    def read(cls, path: Path) -> "ProgramFile":
        """Return what a file holds; raise DataError if it is damaged.

        Sizes are checked here; whether the operations stay within their buffers is
        checked by the runner.
        """
        try:
            content = untrusted.read_bytes(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error}.") from error
        header = _read_header(path, content)
        parts: dict[str, Any] = {}
        place = len(MAGIC) + 8 * len(HEADER)
        for name, kind, shape in _arrays(header):
            count = int(np.prod(shape, dtype=object))
            if count * kind.itemsize > len(content) - place:
                raise DataError(f"{path} is damaged: it ends within its {name}.")
            part = np.frombuffer(content, kind, count, place).reshape(shape)
            parts[name] = part.tobytes() if name == "text" else part
            place += count * kind.itemsize
        if place != len(content):
            raise DataError(f"{path} is damaged: it goes on after its last step.")
        return cls(capacity=header["capacity"], tail=header["tail"], **parts)


def _read_header(path: Path, content: bytes) -> dict[str, int]:
    size = len(MAGIC) + 8 * len(HEADER)
    if len(content) < size or not content.startswith(MAGIC):
        raise DataError(f"{path} is not a program file: it must begin with SAMESTEP.")
    numbers = struct.unpack_from(f"<{len(HEADER)}q", content, len(MAGIC))
    header = dict(zip(HEADER, numbers, strict=True))
    versions = {"version": VERSION, "specification": SPECIFICATION}
    for name, mine in versions.items():
        if header[name] != mine:
            raise DataError(f"{path} must have {name} {mine}, not {header[name]}.")
    for name, number in header.items():
        if not 0 <= number <= MOST:
            raise DataError(f"{path} is damaged: {name} is {number}.")
    if header["capacity"] % PANEL or not header["micro_batches"]:
        raise DataError(f"{path} is damaged: it has no room for whole panels.")
    if header["element"] not in _KINDS:
        raise DataError(
            f"{path} is damaged: its data are neither bytes, float32 nor tokens."
        )
    return header


def _arrays(header: dict[str, int]) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Return the name, type and shape of each array, in their order."""
    h = header
    labels = h["values"] == 0
    data = np.dtype(_KINDS[h["element"]])
    each = h["positions"] if labels else h["values"]
    targets = (h["rows"],) if labels and each == 1 else (h["rows"], each)
    step = step_type(h["micro_batches"], h["capacity"], h["groups"])
    ints, floats = np.dtype("<i8"), np.dtype("<f4")
    return [
        ("ops", OPERATION, (h["ops"],)),
        ("sizes", ints, (h["buffers"],)),
        ("constant_sizes", ints, (h["buffers"],)),
        ("constants", floats, (h["constants"],)),
        ("merges", ints, (h["micro_batches"],)),
        ("parameters", floats, (h["parameters"],)),
        ("running", floats, (h["running"],)),
        ("fixed", floats, (h["fixed"],)),
        ("data", data, (h["rows"], h["features"])),
        ("targets", ints if labels else floats, targets),
        ("groups", ints, (h["groups"], 2)),
        ("pieces", ints, (h["pieces"], 3)),
        ("text", np.dtype("u1"), (h["text"],)),
        ("steps", step, (h["steps"],)),
    ]
