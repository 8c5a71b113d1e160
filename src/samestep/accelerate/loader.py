"""What `prepare` makes of a DataLoader: its batches are global batches."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import DataLoader

from samestep.core.plan import derive_seed
from samestep.data import loading
from samestep.data.batches import batches_of_indices, evaluation_stream
from samestep.data.given import GivenData
from samestep.data.loading import Request
from samestep.data.stream import Bookmark
from samestep.errors import OwnCodeError
from samestep.loop.position import Position


class Progress(Position):
    """Where the training with one loader is."""

    def __init__(self, **recipe: int | str) -> None:
        """Begin with the first step. `recipe` must be the same to go on."""
        super().__init__(**recipe)
        self._loaded: tuple[int, int] | None = None
        """Where to go on, until that is done."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position, with the generators of then. Raises OwnCodeError."""
        super().load_state_dict(state)
        self._loaded = self.epoch, self.step

    def begin(self, epoch: int, step: int) -> Bookmark | None:
        """Begin an epoch with a step; return where its stream goes on, if it has said.

        Raises OwnCodeError if a state was loaded that goes on elsewhere.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded != (epoch, step):
            raise OwnCodeError(
                f"The state that was loaded goes on with step {loaded[1]} of epoch "
                f"{loaded[0]}, and this loop begins with step {step} of epoch {epoch}. "
                f"Use `accelerator.skip_first_batches(loader, {loaded[1]})`; it counts "
                "global batches, as `len(loader)` does."
            )
        _, bookmark = self.start_of(epoch)
        self.reach(epoch, step, bookmark)
        return bookmark


class Owner(Protocol):
    """Who decides what an iteration is for."""

    def iterate(self, loader: "PreparedLoader") -> Iterator[Any]:
        """Return micro-batches for a training, or batches for an evaluation."""


class PreparedLoader:
    """Takes the place of a DataLoader, and has its attributes."""

    def __init__(
        self, owner: Owner, loader: DataLoader[Any], progress: Progress, start: int = 0
    ) -> None:
        """Leave out the first `start` global batches."""
        self._owner, self.base_dataloader = owner, loader
        self.progress, self.start = progress, start

    def __getattr__(self, name: str) -> Any:
        if name == "base_dataloader":  # not there yet, as in a copy
            raise AttributeError(name)
        return getattr(self.base_dataloader, name)

    def __len__(self) -> int:
        """Return the number of global batches. Raises TypeError for a stream."""
        return len(self.base_dataloader) - self.start

    def __iter__(self) -> Iterator[Any]:
        """Train, or evaluate, as the model's mode says."""
        return self._owner.iterate(self)

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of the next iteration from this epoch."""
        self.progress.epoch = epoch

    def without_first(self, batches: int) -> "PreparedLoader":
        """Return a loader that skips more global batches of this epoch."""
        start = self.start + batches
        return PreparedLoader(self._owner, self.base_dataloader, self.progress, start)


def rounds(
    loader: DataLoader[Any], seed: int, rank: int, workers: int
) -> Iterator[tuple[int, Any]]:
    """Yield batches of an evaluation, to each worker one of each round, in their order.

    With how many samples it adds: 0 where there is none left for this worker. It then
    gets the last one again, so that all are in a loop together.
    """
    source = GivenData.of(loader, None, None)
    if source.is_stream:
        batches = evaluation_stream(source, seed)
        while group := list(islice(batches, workers)):
            samples = group[rank].size if rank < len(group) else 0
            yield samples, group[min(rank, len(group) - 1)].fetch(0)
        return
    indices = batches_of_indices(source, seed, None)
    last = len(indices) - 1
    own = [min(first + rank, last) for first in range(0, last + 1, workers)]
    requests = (Request(derive_seed(seed, "share", i), indices[i]) for i in own)
    loaded = loading.load(source.data, source.collate, requests, loader)
    for first in range(0, last + 1, workers):
        is_own = first + rank <= last
        yield (len(indices[first + rank]) if is_own else 0), next(loaded)
