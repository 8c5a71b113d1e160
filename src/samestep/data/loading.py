"""Loads micro-batches: in this process, or ahead of time in those of a DataLoader.

The process that loads a micro-batch seeds the generators for it, and the model goes on
drawing from there. So it makes no difference to the bits which process has loaded.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.data import default_collate as torch_collate

from samestep.core.ownership import Share
from samestep.system.json_values import JsonObject
from samestep.user_code import seeding


Collate = Callable[[list[Any]], Any]
States = tuple[Tensor, JsonObject]
"""The states of torch's generator, and of Python's and numpy's."""


class Request(NamedTuple):
    """One micro-batch: the seed of its generators, and its samples' indices."""

    seed: int
    samples: Sequence[int]


class Loaded(NamedTuple):
    """A micro-batch, and the generators as they are after loading it."""

    batch: Any
    states: States

    def take(self) -> Any:
        """Set the generators, and return the micro-batch."""
        state, others = self.states
        torch.set_rng_state(state)
        seeding.set_other_states(others)
        return self.batch


def collated(samples: list[Any], collate: Collate, seed: int) -> Loaded:
    """Seed the generators and put samples together."""
    seeding.seed(seed)
    return Loaded(collate(samples), (torch.get_rng_state(), seeding.other_states()))


class MapStyle(Dataset[Any]):
    """The micro-batches of samples that have an index."""

    def __init__(self, data: Any, collate: Collate) -> None:
        self._data, self._collate = data, collate

    def load(self, request: Request) -> Any:
        """Return a micro-batch; leaves the generators as they are after loading it."""
        seeding.seed(request.seed)
        if isinstance(self._data, TensorDataset) and self._collate is torch_collate:
            chosen = torch.as_tensor(request.samples)
            return [tensor[chosen] for tensor in self._data.tensors]
        return self._collate([self._data[int(i)] for i in request.samples])

    def __getitem__(self, request: Request) -> Loaded:
        batch = self.load(request)
        return Loaded(batch, (torch.get_rng_state(), seeding.other_states()))


def load(
    data: Any,
    collate: Collate,
    requests: Iterator[Request],
    loader: DataLoader[Any] | None,
) -> Iterator[Any]:
    """Yield micro-batches, one for each request, in their order.

    If the `loader` has worker processes, as many load ahead.
    """
    source = MapStyle(data, collate)
    if loader is None or not loader.num_workers:
        yield from map(source.load, requests)
        return
    for loaded in ahead(source, loader, loader.num_workers, requests):
        yield loaded.take()


def ahead(
    source: Dataset[Any],
    loader: DataLoader[Any],
    processes: int,
    requests: Iterable[Any],
) -> Iterator[Any]:
    """Yield what `source` has, loaded by processes as the `loader` would start them.

    For a free process the next request is asked for.
    """
    return iter(
        DataLoader(
            source,
            batch_size=None,
            sampler=requests,
            num_workers=processes,
            collate_fn=_as_it_is,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor,
        )
    )


def _as_it_is(item: Any) -> Any:
    return item


Key = tuple[int, Any]
"""The number of a global batch, and which part of it."""
Wants = Callable[["Requests", Share], Iterator[tuple[Key, Any]]]
"""Yields what a share needs from the current global batch on, and how to request it."""


class Requests:
    """What a worker whose share of micro-batches may move asks its processes for.

    After a move it asks for what it lacks, behind what they load already.
    """

    def __init__(self, wants: Wants, share: Callable[[], Share], start: int) -> None:
        """Begin with the global batch `start`."""
        self._wants, self._share = wants, share
        self.at = start
        """The current global batch."""
        self.pending: deque[Key] = deque()
        """What has not arrived yet, in the order in which it will."""
        self._made: set[Key] = set()
        self._planned: Share | None = None
        self._plan: Iterator[tuple[Key, Any]] = iter(())

    def __iter__(self) -> "Requests":
        return self

    def __next__(self) -> Any:
        """Return the next request, for a process that is free."""
        share = self._share()
        if share != self._planned:
            self._planned, self._plan = share, self._wants(self, share)
        for key, request in self._plan:
            if key not in self._made:
                self._made.add(key)
                self.pending.append(key)
                return request
        raise StopIteration

    def reach(self, number: int) -> None:
        """Note which global batch is the current one."""
        if number != self.at:
            self.at = number
            self._made = {key for key in self._made if key[0] >= number}


class Ahead:
    """What processes have loaded for the requests of a worker."""

    def __init__(
        self,
        source: Dataset[Any],
        loader: DataLoader[Any],
        processes: int,
        requests: Requests,
    ) -> None:
        """Start the processes when something is taken."""
        self._start = partial(ahead, source, loader, processes, requests)
        self._requests = requests
        self._arrived: dict[Key, Any] = {}
        self._loaded: Iterator[Any] | None = None

    def reach(self, number: int) -> None:
        """Forget what is of global batches before the current one."""
        self._requests.reach(number)
        self._arrived = {k: v for k, v in self._arrived.items() if k[0] >= number}

    def take(self, key: Key) -> Any:
        """Return, once, something that the share needs."""
        while key not in self._arrived:
            if self._loaded is None:
                self._loaded = self._start()
                assert self._requests.pending, f"{key} is not of the share"
            for loaded in self._loaded:
                self._arrived[self._requests.pending.popleft()] = loaded
                break
            else:  # all was loaded before the share moved
                self._loaded = None
        return self._arrived.pop(key)
