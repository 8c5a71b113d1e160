"""The global batches of an epoch: all workers find the same, without asking each other.

Of samples with an index, each worker loads its own micro-batches only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
)

from samestep.core.ownership import Share, shares
from samestep.core.plan import Plan, derive_seed
from samestep.data import loading
from samestep.data.given import GivenData, set_epoch
from samestep.data.loading import Ahead, Key, Request, Requests
from samestep.data.stream import (
    Bookmark,
    Part,
    RawBatch,
    Stream,
    StreamPart,
    digest_of,
)
from samestep.user_code import seeding


class GlobalBatch(NamedTuple):
    """The samples of one step."""

    size: int
    """How many samples all workers have."""
    fetch: Callable[[int], Any]
    """Returns one of the worker's micro-batches that have samples, and leaves the
    generators where the model draws from."""
    digest: str = ""
    """Unless empty, must be the same on all workers."""
    bookmark: Bookmark | None = None
    """Before this batch, if it comes from a stream with a `state_dict`."""


def global_batches(
    source: GivenData,
    seed: int,
    epoch: int | None,
    micro_batches: int,
    share: Callable[[], Share],
    start: int = 0,
    bookmark: Bookmark | None = None,
) -> Iterator[GlobalBatch]:
    """Yield the global batches of an epoch from number `start` on.

    Processes load the micro-batches of the `share` ahead, which may change. `epoch` is
    None for an evaluation. A stream goes on behind a `bookmark`, if there is one, up to
    `start`.
    """
    if source.is_stream:
        given = source, seed, epoch or 0, micro_batches, start, bookmark
        yield from _of_stream(Stream(*given), share)
        return
    batches = batches_of_indices(source, seed, epoch)

    def request(index: int, m: int) -> Request:
        first, end = shares(len(batches[index]), micro_batches)[m]
        number = index if epoch is None else epoch * len(batches) + index
        purpose = "share" if epoch is None else "step"
        m_seed = derive_seed(seed, purpose, number, m)
        return Request(m_seed, batches[index][first:end])

    fetch = _fetcher(source, request, share, start, len(batches))
    digest = digest_of(batches) if source.is_ordered_by_others else ""
    for index, batch in enumerate(batches[start:], start):
        yield GlobalBatch(len(batch), partial(fetch, index), digest)
        digest = ""


def _fetcher(
    source: GivenData,
    request: Callable[[int, int], Request],
    share: Callable[[], Share],
    start: int,
    end: int,
) -> Callable[[int, int], Any]:
    """Return what loads a micro-batch, of global batches from `start` to `end`."""
    data, loader = loading.MapStyle(source.data, source.collate), source.loader
    if loader is None or not loader.num_workers:
        return lambda index, m: data.load(request(index, m))

    def wants(requests: Requests, owned: Share) -> Iterator[tuple[Key, Request]]:
        for index in range(requests.at, end):
            for m in range(*owned):
                wanted = request(index, m)
                if len(wanted.samples):
                    yield (index, m), wanted

    ahead = Ahead(data, loader, loader.num_workers, Requests(wants, share, start))

    def fetch(index: int, m: int) -> Any:
        ahead.reach(index)
        return ahead.take((index, m)).take()

    return fetch


def _of_stream(stream: Stream, share: Callable[[], Share]) -> Iterator[GlobalBatch]:
    loader = stream.source.loader
    if loader is not None and stream.source.has_processes:
        yield from _read_ahead(stream, loader, share)
        return
    batches = iter(stream)
    while True:
        with seeding.kept():
            batch = next(batches, None)
            if batch is None:
                return
            digest = stream.digest(batch)

        def fetch(m: int, batch: RawBatch = batch) -> Any:
            return stream.load(batch, m).batch

        yield GlobalBatch(len(batch.samples), fetch, digest, batch.bookmark)


def _read_ahead(
    stream: Stream, loader: DataLoader[Any], share: Callable[[], Share]
) -> Iterator[GlobalBatch]:
    """Yield the global batches of a stream that one process reads.

    Several would each read a part.
    """

    def wants(requests: Requests, owned: Share) -> Iterator[tuple[Key, Part]]:
        for number in count(requests.at):
            yield (number, owned), Part(number, owned, oldest=requests.at)

    ahead = Ahead(stream, loader, 1, Requests(wants, share, stream.start))
    for number in count(stream.start):
        with seeding.kept():
            part: StreamPart | None = ahead.take((number, share()))
        if part is None:
            return

        def fetch(m: int, number: int = number, part: StreamPart = part) -> Any:
            ahead.reach(number)
            if m not in part.micro_batches:  # the share has moved
                others: StreamPart = ahead.take((number, share()))
                part.micro_batches.update(others.micro_batches)
            return part.micro_batches[m].take()

        yield GlobalBatch(part.size, fetch, part.digest, part.bookmark)


def evaluation_batches(
    source: GivenData, seed: int, rank: int, workers: int
) -> Iterator[tuple[int, int, Callable[[], Any] | None]]:
    """Yield number and size of each batch, and what fetches it, if it is this worker's.

    Samples with an index are taken in their own order, or in that of a sampler other
    than a RandomSampler.
    """
    if not source.is_stream:
        batches = batches_of_indices(source, seed, None)
        own = range(rank, len(batches), workers)
        requests = (Request(derive_seed(seed, "share", i), batches[i]) for i in own)
        loaded = loading.load(source.data, source.collate, requests, source.loader)
        for index, batch in enumerate(batches):
            yield index, len(batch), partial(next, loaded) if index in own else None
        return
    for index, read in enumerate(evaluation_stream(source, seed)):
        is_own = index % workers == rank
        yield index, read.size, partial(read.fetch, 0) if is_own else None


def evaluation_stream(source: GivenData, seed: int) -> Iterator[GlobalBatch]:
    """Yield the batches of a stream, whole."""
    return _of_stream(Stream(source, seed, 0, 1), lambda: (0, 1))


def batches_of_indices(
    source: GivenData, seed: int, epoch: int | None, is_portable: bool = False
) -> list[Sequence[int]]:
    """Return the indices of all global batches of an epoch, in their order.

    Shuffled ones are drawn from the seed and the epoch, with and without a DataLoader;
    not for an evaluation, `epoch` None. Samplers other than RandomSampler are asked,
    with generators that are seeded likewise.
    """
    loader, size = source.loader, source.global_batch
    if loader is None or type(loader.batch_sampler) is BatchSampler:
        assert size is not None
        order = _order(source, seed, epoch, is_portable)
        cut = [order[first : first + size] for first in range(0, len(order), size)]
        if source.drops_last and cut and len(cut[-1]) < size:
            cut.pop()
        return cut
    with _seeded(seed, epoch or 0, loader, loader.batch_sampler):
        return [list(batch) for batch in loader.batch_sampler or ()]


def _order(
    source: GivenData, seed: int, epoch: int | None, is_portable: bool
) -> Sequence[int]:
    loader, count = source.loader, len(source.data)
    sampler: Any = loader and loader.sampler
    is_shuffled = sampler is None or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and len(sampler) == count
    )
    if type(sampler) is SequentialSampler or (is_shuffled and epoch is None):
        return range(count)
    if is_shuffled and epoch is not None:
        plan = Plan(count, 1, 1, seed, is_portable)
        order: Sequence[int] = plan.order(epoch).tolist()
        return order
    with _seeded(seed, epoch or 0, loader, sampler):
        return list(sampler)


@contextmanager
def _seeded(
    seed: int, epoch: int, loader: DataLoader[Any] | None, sampler: Any
) -> Iterator[None]:
    """Seed every generator that a sampler may draw from, for the epoch."""
    number = derive_seed(seed, "sampler", epoch)
    inner = getattr(sampler, "sampler", None)
    for owner in (loader, sampler, inner):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(number)
        set_epoch(owner, epoch)
    with seeding.kept():
        seeding.seed(number)
        yield
