"""What Transformers iterates over in an epoch: its batches are global batches."""

from collections.abc import Iterator
from itertools import repeat
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from samestep.data.batches import GlobalBatch
from samestep.errors import OwnCodeError
from samestep.loop.loop import Loop
from samestep.loop.position import Position


class Steps(IterableDataset[GlobalBatch | None]):
    """The global batches of one epoch of a DataLoader, the same in every process."""

    def __init__(self, loop: Loop, loader: Any, position: Position) -> None:
        """Begin where `position` is, and move it. Raises OwnCodeError."""
        if not isinstance(loader, DataLoader):
            raise OwnCodeError(
                "Global batches are cut from the samples of a DataLoader; "
                f"`get_train_dataloader` returned {type(loader).__name__}."
            )
        self._loop, self._loader, self._position = loop, loader, position

    def loader(self) -> DataLoader[Any]:
        """Return what `_run_epoch` takes for its DataLoader."""
        return DataLoader(self, batch_size=None, collate_fn=_as_it_is)

    def __len__(self) -> int:
        """Return how many there are. Raises TypeError for a stream."""
        return len(self._loader)

    def __iter__(self) -> Iterator[GlobalBatch | None]:
        """Begin the epoch, or go on with it."""
        epoch, start = self._position.epoch, self._position.step
        _, bookmark = self._position.start_of(epoch)
        # Transformers skips as many, as if it had to read what it has trained on.
        yield from repeat(None, start)
        batches = self._loop.global_batches(
            self._loader, epoch=epoch, start=start, bookmark=bookmark
        )
        for index, batch in enumerate(batches, start):
            self._position.reach(epoch, index + 1, batch.bookmark)
            yield batch


def _as_it_is(item: Any) -> Any:
    return item
