"""The global batches of an epoch: all workers find the same, without asking each other.

Of samples with an index, each worker loads its own micro-batches only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from samestep.data.loading import Request
from samestep.data.stream import Bookmark, Stream, StreamBatch, digest_of
from samestep.user_code import seeding


class GlobalBatch(NamedTuple):
    """The samples of one step."""

    size: int
    """How many samples all workers have."""
    fetch: Callable[[], Any]
    """Returns the next of this worker's micro-batches that have samples, and leaves
    the generators where the model draws from."""
    digest: str = ""
    """Unless empty, must be the same on all workers."""
    bookmark: Bookmark | None = None
    """Before this batch, if it comes from a stream with a `state_dict`."""


def global_batches(
    source: GivenData,
    seed: int,
    epoch: int | None,
    micro_batches: int,
    share: Share,
    start: int = 0,
    bookmark: Bookmark | None = None,
) -> Iterator[GlobalBatch]:
    """Yield the global batches of an epoch from number `start` on.

    Each has the micro-batches of `share`. `epoch` is None for an evaluation. A stream
    goes on behind a `bookmark`, if there is one, up to `start`.
    """
    if source.is_stream:
        given = source, seed, epoch or 0, micro_batches, share, start, bookmark
        yield from _of_stream(Stream(*given))
        return
    batches = batches_of_indices(source, seed, epoch)

    def requests() -> Iterator[Request]:
        for index, batch in enumerate(batches[start:], start):
            number = index if epoch is None else epoch * len(batches) + index
            for m in range(*share):
                first, end = shares(len(batch), micro_batches)[m]
                if first < end:
                    purpose = "share" if epoch is None else "step"
                    m_seed = derive_seed(seed, purpose, number, m)
                    yield Request(m_seed, batch[first:end])

    loaded = loading.load(source.data, source.collate, requests(), source.loader)
    digest = digest_of(batches) if source.is_ordered_by_others else ""
    for batch in batches[start:]:
        yield GlobalBatch(len(batch), partial(next, loaded), digest)
        digest = ""


def _of_stream(stream: "Stream") -> Iterator[GlobalBatch]:
    loader = stream.source.loader
    if loader is not None and stream.source.has_processes:
        read = loading.ahead(stream, loader, 1)  # several would each read a part
    else:
        read = iter(stream)
    while True:
        with seeding.kept():
            batch: StreamBatch | None = next(read, None)
        if batch is None:
            return
        own = (loaded.take() for loaded in batch.own)
        yield GlobalBatch(batch.size, partial(next, own), batch.digest, batch.bookmark)


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
        yield index, read.size, read.fetch if index % workers == rank else None


def evaluation_stream(source: GivenData, seed: int) -> Iterator[GlobalBatch]:
    """Yield the batches of a stream, whole."""
    return _of_stream(Stream(source, seed, 0, 1, (0, 1)))


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
