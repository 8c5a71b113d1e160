"""Samples without an index: all workers read them all, and cut them by position.

A stream has generators of its own: what it draws depends neither on what is drawn
between two of its samples, nor on who reads it.
"""

import base64
import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from samestep.core.ownership import Share, lengths, shares
from samestep.core.plan import derive_seed
from samestep.data import loading
from samestep.data.given import GivenData, set_epoch
from samestep.data.loading import Loaded, States
from samestep.errors import OwnCodeError
from samestep.state.fingerprint import raw_bytes
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding


MOST_COMPARED = 256
"""Numbers of each tensor of a sample that are compared."""
MOST_CHARACTERS = 16_384
"""The most of the state of a stream as JSON, which checkpoints keep."""


class Bookmark(NamedTuple):
    """Where a stream that has a `state_dict` goes on without being read again."""

    number: int
    """The global batch of the epoch that comes next."""
    state: Any
    """What `state_dict` returned before that batch was read."""
    generators: States
    digest: str
    """The digest of its samples."""


class RawBatch(NamedTuple):
    """The samples of one global batch of a stream."""

    number: int
    """Counted from 0 in the epoch."""
    samples: list[Any]
    bookmark: Bookmark | None
    """None if the stream has no `state_dict`, and before the first batch."""


class _Reading(NamedTuple):
    data: Any
    samples: Iterator[Any]
    number: int


def read(
    source: GivenData,
    seed: int,
    epoch: int,
    start: int = 0,
    bookmark: Bookmark | None = None,
) -> Iterator[RawBatch]:
    """Read an epoch once; yield its global batches from number `start` on.

    Call `next` where the generators are kept: they are those of the stream then. Warns
    if it does not go on behind a `bookmark` as it did before, and is read again.
    """
    size = source.global_batch
    reading = bookmark and _resumed(source, epoch, bookmark)
    data, samples, index = reading or _begun(source, seed, epoch)
    while True:
        mark, reading = bookmark if reading else None, None
        if mark is None and index >= start:
            mark = _mark(data, index)
        batch = list(islice(samples, size))
        if not batch or (source.drops_last and len(batch) < (size or 0)):
            return
        if index >= start:
            states = torch.get_rng_state(), seeding.other_states()
            mark = mark and mark._replace(digest=sketch(batch))
            yield RawBatch(index, batch, mark)
            Loaded(None, states).take()
        index += 1


def first_samples(source: GivenData, seed: int, most: int | None) -> list[Any]:
    """Return the first samples of the first epoch. Raises OwnCodeError."""
    if iter(source.data) is source.data:
        raise OwnCodeError(
            f"A stream is read several times, and a {type(source.data).__name__} is "
            "used up after one. Give an IterableDataset, or another object whose "
            "`__iter__` begins anew."
        )
    with seeding.kept():
        return list(islice(_begun(source, seed, 0).samples, most))


def _begun(source: GivenData, seed: int, epoch: int) -> _Reading:
    set_epoch(source.data, epoch)
    seeding.seed(derive_seed(seed, "stream", epoch))
    return _Reading(source.data, iter(source.data), 0)


def _resumed(source: GivenData, epoch: int, bookmark: Bookmark) -> _Reading | None:
    """Return a copy of the stream that goes on behind the bookmark, or None.

    It is a copy since later epochs begin at the start again.
    """
    if bookmark.digest == sketch([]):  # of objects that cannot be compared
        return None
    try:
        data = copy.deepcopy(source.data)
    except Exception:  # it has an open file, for example
        return None
    set_epoch(data, epoch)
    data.load_state_dict(copy.deepcopy(bookmark.state))
    Loaded(None, bookmark.generators).take()
    samples = iter(data)
    batch = list(islice(samples, source.global_batch))
    if sketch(batch) == bookmark.digest:
        return _Reading(data, chain(batch, samples), bookmark.number)
    warnings.warn(
        "After `load_state_dict` the stream goes on with other samples than before, as "
        "if a buffer were not part of its state. It is read again from its start.",
        stacklevel=2,
    )
    return None


def _mark(data: Any, index: int) -> Bookmark | None:
    """Return where a stream is, without the digest of what comes next."""
    if not index or not _has_state(data):
        return None
    states = torch.get_rng_state(), seeding.other_states()
    return Bookmark(index, copy.deepcopy(data.state_dict()), states, "")


def _has_state(data: Any) -> bool:
    if not callable(getattr(data, "load_state_dict", None)):
        return False
    function = getattr(data, "state_dict", None)
    try:  # those of some libraries have parameters
        return callable(function) and bool(inspect.signature(function).bind() or True)
    except TypeError:
        return False


def json_of_bookmark(bookmark: Bookmark | None) -> JsonObject | None:
    """Return a bookmark as JSON values; None if it has others, or is large."""
    if bookmark is None:
        return None
    number, state, (torch_state, others), digest = bookmark
    try:
        text = json.dumps(state)
    except (TypeError, ValueError):
        return None
    if len(text) > MOST_CHARACTERS or json.loads(text) != state:
        return None
    encoded = base64.b64encode(raw_bytes(torch_state)).decode()
    return {
        "number": number,
        "state": state,
        "torch": encoded,
        "others": others,
        "digest": digest,
    }


def bookmark_of_json(values: JsonObject | None) -> Bookmark | None:
    """Return the bookmark that `json_of_bookmark` was called on."""
    if values is None:
        return None
    raw = bytearray(base64.b64decode(values["torch"]))
    states = torch.frombuffer(raw, dtype=torch.uint8), values["others"]
    return Bookmark(values["number"], values["state"], states, values["digest"])


class Part(NamedTuple):
    """Requests some micro-batches of one global batch of a stream."""

    number: int
    share: Share
    oldest: int
    """No global batch before this one is requested any more."""


class StreamPart(NamedTuple):
    """Micro-batches of one global batch of a stream, by their numbers."""

    size: int
    """How many samples the global batch has."""
    micro_batches: dict[int, Loaded]
    digest: str
    bookmark: Bookmark | None


class Stream(Dataset[StreamPart | None]):
    """A stream, cut into global batches by position."""

    def __init__(
        self,
        source: GivenData,
        seed: int,
        epoch: int,
        micro_batches: int,
        start: int = 0,
        bookmark: Bookmark | None = None,
    ) -> None:
        """Begin with the global batch `start`."""
        self.start, self._bookmark = start, bookmark
        self.source, self._seed, self._epoch = source, seed, epoch
        self._micro_batches = micro_batches
        self._read: Iterator[RawBatch] | None = None
        self._batches: dict[int, RawBatch] = {}
        """Those that may be requested again."""

    def __iter__(self) -> Iterator[RawBatch]:
        """Read the stream once."""
        given = self.source, self._seed, self._epoch, self.start, self._bookmark
        return read(*given)

    def __getitem__(self, part: Part) -> StreamPart | None:
        """Read up to a global batch; return some of it, or None after the end."""
        self._read = self._read or iter(self)
        kept = self._batches.items()
        self._batches = {n: batch for n, batch in kept if n >= part.oldest}
        while part.number not in self._batches:
            batch = next(self._read, None)
            if batch is None:
                return None
            self._batches[batch.number] = batch
        batch = self._batches[part.number]
        sizes = lengths(shares(len(batch.samples), self._micro_batches))
        own = {m: self.load(batch, m) for m in range(*part.share) if sizes[m]}
        return StreamPart(sum(sizes), own, self.digest(batch), batch.bookmark)

    def load(self, batch: RawBatch, m: int) -> Loaded:
        """Put the samples of a micro-batch together."""
        first, end = shares(len(batch.samples), self._micro_batches)[m]
        seed = derive_seed(self._seed, "step", self._epoch, batch.number, m)
        return loading.collated(batch.samples[first:end], self.source.collate, seed)

    def digest(self, batch: RawBatch) -> str:
        """Return the SHA-256 of all samples of the first batch; empty after it."""
        if batch.number != self.start:
            return ""
        seed = derive_seed(self._seed, "stream", self._epoch)
        samples = loading.collated(batch.samples, self.source.collate, seed)
        return digest_of(samples.batch)


def sketch(samples: list[Any]) -> str:
    """Return the SHA-256 of the first numbers of each part of the samples."""
    return digest_of(
        [
            leaf.flatten()[:MOST_COMPARED]
            if isinstance(leaf, Tensor | np.ndarray)
            else leaf
            for leaf in _leaves(samples)
        ]
    )


def digest_of(batch: Any) -> str:
    """Return the SHA-256 of the tensors, arrays, numbers and texts of a batch."""
    digest = hashlib.sha256()
    for leaf in _leaves(batch):
        if isinstance(leaf, np.ndarray):
            digest.update(leaf.tobytes())
        elif isinstance(leaf, Tensor):
            digest.update(raw_bytes(leaf))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from _leaves(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, Tensor | np.ndarray | int | float | str | bytes):
        yield value
    elif hasattr(value, "getbands"):  # a picture of Pillow
        yield value.tobytes()
