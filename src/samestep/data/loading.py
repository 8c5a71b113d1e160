"""Loads micro-batches: in this process, or ahead of time in those of a DataLoader.

The process that loads a micro-batch seeds the generators for it, and the model goes on
drawing from there. So it makes no difference to the bits which process has loaded.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch.utils.data import default_collate as torch_collate

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
    for loaded in ahead(source, loader, loader.num_workers, list(requests)):
        yield loaded.take()


def ahead(
    source: MapStyle | IterableDataset[Any],
    loader: DataLoader[Any],
    processes: int,
    requests: list[Request] | None = None,
) -> Iterator[Any]:
    """Yield what `source` has, loaded by processes as the `loader` would start them."""
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
