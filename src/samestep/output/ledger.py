"""The ledgers of a run: hashes of every optimizer step, in small files.

    header   b"samestep", version, bytes of a record; SHA-256 of the recipe
    chunk    number of records; the records; SHA-256
    record   step, hash of the gradient, hash of the parameters

A record of the ledger of micro-batches has the step, then for each micro-batch the hash
of its own gradient and the rank of the worker that computed it. Numbers are uint64,
little-endian; steps count from 1. A chunk has the steps of one line of metrics.jsonl.
Its SHA-256 is that of the SHA-256 before it (of the header, for the first), of the
number and of the records, so the last one stands for the whole file.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from samestep.errors import RunError
from samestep.files import untrusted
from samestep.output.json_lines import Appended


FILE: Final = "ledger"
MICRO_BATCHES: Final = "ledger-micro-batches"
FILES: Final = (FILE, MICRO_BATCHES)
MAGIC: Final = b"samestep"
VERSION = 1
HASHES = 2
"""Numbers of a record besides the step; of each micro-batch in their ledger."""
DIGEST = 32
"""Bytes of a SHA-256."""
HEADER = struct.Struct("<8sQQ32s")
MOST_RECORDS = 1 << 20
"""The most records of a chunk; samestep writes 50 at most."""

Records = NDArray[np.uint64]
"""[n, 1 + columns]: the step, then hashes."""


def columns(micro_batches: int) -> dict[str, int]:
    """Return the numbers of a record besides the step, by file."""
    return {FILE: HASHES, MICRO_BATCHES: HASHES * micro_batches}


def header_of(recipe_digest: str, columns: int = HASHES) -> bytes:
    """Return the header of the ledger of a recipe."""
    digest = bytes.fromhex(recipe_digest)
    return HEADER.pack(MAGIC, VERSION, _record_bytes(columns), digest)


def _record_bytes(columns: int) -> int:
    return 8 * (1 + columns)


def head_of(header: bytes) -> bytes:
    """Return the SHA-256 with which the chain begins."""
    return hashlib.sha256(header).digest()


def chunk_of(records: Records, before: bytes) -> bytes:
    """Return a chunk, whose last bytes continue the chain from the SHA-256 `before`."""
    content = struct.pack("<Q", len(records)) + records.astype("<u8").tobytes()
    return content + hashlib.sha256(before + content).digest()


@dataclass(frozen=True)
class Ledger:
    """What a ledger holds, its chain checked."""

    recipe_digest: str
    chunks: list[Records]
    head: bytes
    """The last SHA-256 of the chain."""
    is_whole: bool
    """Whether nothing follows the last complete chunk."""
    columns: int = HASHES
    """Numbers of a record besides the step."""

    @cached_property
    def records(self) -> Records:
        """The records of all steps."""
        nothing = np.zeros((0, 1 + self.columns), np.uint64)
        return np.concatenate([nothing, *self.chunks])


def parse(content: bytes, columns: int = HASHES) -> Ledger:
    """Read a ledger, which may end in the middle of a chunk.

    Raises ValueError, whose text says what is wrong.
    """
    if len(content) < HEADER.size:
        raise ValueError("it has no header")
    magic, version, size, digest = HEADER.unpack_from(content)
    if (magic, version, size) != (MAGIC, VERSION, _record_bytes(columns)):
        raise ValueError("its header is not that of this version")
    head, place, last = head_of(content[: HEADER.size]), HEADER.size, 0
    chunks: list[Records] = []
    while (end := _end_of_chunk(content, place, size)) <= len(content):
        body, found = content[place : end - DIGEST], content[end - DIGEST : end]
        head = hashlib.sha256(head + body).digest()
        if found != head:
            raise ValueError(f"the chain of hashes is broken after step {last}")
        records = np.frombuffer(body, "<u8", offset=8).reshape(-1, 1 + columns)
        if records[:, 0].tolist() != list(range(last + 1, last + 1 + len(records))):
            raise ValueError(f"its steps are not consecutive after step {last}")
        chunks.append(records.astype(np.uint64))
        place, last = end, last + len(records)
    is_whole = place == len(content)
    return Ledger(digest.hex(), chunks, head, is_whole, columns)


def _end_of_chunk(content: bytes, place: int, size: int) -> int:
    """Return where a chunk ends; behind the content if it is not complete."""
    if len(content) < place + 8:
        return len(content) + 1
    (count,) = struct.unpack_from("<Q", content, place)
    if not 0 < count <= MOST_RECORDS:
        raise ValueError(f"its chunk at byte {place} has {count} records")
    return place + 8 + int(count) * size + DIGEST


def digest_at(content: bytes, columns: int, step: int, latest: str) -> str:
    """Return a SHA-256 of the records of all steps up to `step`.

    `latest` has the hashes of the last of them, as `LedgerFile.add` takes them. Empty
    if the ledger is damaged or lacks other steps.
    """
    try:
        chunks = parse(content, columns).chunks
    except ValueError:
        return ""
    kept = [chunk for chunk in chunks if chunk[-1, 0] <= step]
    if sum(map(len, kept)) + len(latest) // (16 * columns) != step:
        return ""
    records = b"".join(chunk.tobytes() for chunk in kept)
    return hashlib.sha256(records + latest.encode()).hexdigest()


@dataclass
class LedgerFile(Appended):
    """A ledger of the run that is written."""

    columns: int = HASHES
    """Numbers of a record besides the step."""
    last: int = 0
    """The last step in it."""
    is_lost: bool = field(default=True)
    """Whether it lacks steps, so that it cannot be continued."""
    _head: bytes = b""

    @property
    def sha256(self) -> str | None:
        """The last SHA-256 of the chain; None without a ledger."""
        return None if self.is_lost else self._head.hex()

    def begin(self, recipe_digest: str, step: int) -> bytes | None:
        """Return the content with which a run goes on after `step`.

        Chunks of later steps are dropped. None if there is none, or an empty file: an
        earlier version wrote the run. Raises RunError if the file is damaged.
        """
        content = header_of(recipe_digest, self.columns)
        self.last, self.is_lost, self._head = 0, False, head_of(content)
        if step == 0:
            return content
        for chunk in self._chunks():
            if chunk[-1, 0] > step:
                break
            content += self._next(chunk)
        return None if self.is_lost else content

    def _chunks(self) -> list[Records]:
        try:
            content = untrusted.read_bytes(self.path) if self.path.exists() else b""
            self.is_lost = not content
            return parse(content, self.columns).chunks if content else []
        except (OSError, ValueError) as error:
            raise RunError(
                f"The ledger {self.path} is damaged: {error}. Remove it to go on "
                "without a ledger; the weights will be the same, but no audit can "
                "check the run."
            ) from None

    def add(self, step: int, hashes: str) -> None:
        """Append a chunk: 16 hexadecimal digits for each number of the steps to `step`.

        A ledger that lacks steps before them ends, with a warning.
        """
        if self.is_lost or not hashes:
            return
        numbers = np.frombuffer(bytes.fromhex(hashes), ">u8").reshape(-1, self.columns)
        steps = np.arange(step - len(numbers) + 1, step + 1, dtype=np.uint64)
        if steps[0] != self.last + 1:
            self.is_lost = True
            self.warn(
                f"{self.path} lacks the steps from {self.last + 1} to {steps[0] - 1}, "
                "so it ends there, and no audit can check the rest of the run."
            )
            return
        records = np.column_stack([steps, numbers.astype(np.uint64)])
        self.append_bytes(self._next(records))

    def _next(self, records: Records) -> bytes:
        chunk = chunk_of(records, self._head)
        self.last, self._head = int(records[-1, 0]), chunk[-DIGEST:]
        return chunk
