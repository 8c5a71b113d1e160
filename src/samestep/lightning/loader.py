"""What Lightning takes for a DataLoader: its batches are global batches."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.data import DataLoader

from samestep.core.ownership import lengths, shares
from samestep.data.batches import GlobalBatch
from samestep.data.stream import Bookmark, bookmark_of_json, json_of_bookmark
from samestep.errors import OwnCodeError
from samestep.loop.loop import Loop
from samestep.system.json_values import JsonObject


class Place(NamedTuple):
    """Where a loader is."""

    epoch: int
    step: int = 0
    cycle: int = 0
    """How often it has begun again in this epoch, beside a longer one."""
    bookmark: Bookmark | None = None
    """Before the last step, if it comes from a stream with a `state_dict`."""


class Batch:
    """A global batch: what Lightning and callbacks get as a batch.

    Its samples are spread over the processes, so they are not in it.
    """

    def __init__(
        self, loader: "GlobalBatches", content: GlobalBatch, after: Place
    ) -> None:
        self._loader, self._after = loader, after
        self._content: GlobalBatch | None = content
        self.size = content.size
        """How many samples it has."""

    def take(self) -> GlobalBatch:
        """Return what the loop computes, once.

        Raises OwnCodeError if an optimizer asks for it again.
        """
        if self._content is None:
            raise OwnCodeError(
                "A global batch is computed once for each step, and this optimizer "
                "computes its loss several times (as LBFGS does). Use an optimizer "
                "that needs one pass."
            )
        content, self._content = self._content, None
        return content

    def finish(self) -> None:
        """Let its loader go on after it, if it is resumed."""
        self._loader.place = self._after


class GlobalBatches:
    """The global batches of a DataLoader, the same in every process.

    It may be resumed: its state is its place after the last step.
    """

    def __init__(
        self, loop: Loop, loader: DataLoader[Any], epoch: Callable[[], int | None]
    ) -> None:
        """Draw the order from what `epoch` returns; None for an evaluation."""
        self._loop, self._loader, self._epoch = loop, loader, epoch
        self._next = Place(-1)
        """Where the next iteration begins, if it is of this epoch."""
        self.place = Place(0)

    def __len__(self) -> int:
        """Return how many there are. Raises TypeError for a stream."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Begin the epoch, go on with it, or begin again in it, in another order."""
        epoch = self._epoch()
        place = self._next if self._next.epoch == epoch else Place(epoch or 0)
        self._next, self.place = Place(-1), place
        drawn = None if epoch is None else epoch + (place.cycle << 32)
        for batch in self._loop.global_batches(
            self._loader, epoch=drawn, start=place.step, bookmark=place.bookmark
        ):
            place = place._replace(step=place.step + 1, bookmark=batch.bookmark)
            yield Batch(self, batch, after=place)
        self._next = Place(place.epoch, cycle=place.cycle + 1)

    def state_dict(self) -> JsonObject:
        """Return how far the epoch is, at any number of processes."""
        bookmark = json_of_bookmark(self.place.bookmark)
        return self.place._asdict() | {"bookmark": bookmark}

    def load_state_dict(self, state: JsonObject) -> None:
        """Go on from there in the next iteration."""
        bookmark = bookmark_of_json(state.get("bookmark"))
        self._next = Place(**state | {"bookmark": bookmark})


def is_global(batch: Any) -> bool:
    """Return whether it is a global batch, or a collection with some."""
    return any(isinstance(leaf, Batch) for leaf in tree_leaves(batch))


def finish(batch: Any) -> None:
    """Note that a step with this batch, or collection of batches, was made."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Batch):
            leaf.finish()


def content(batch: Any, micro_batches: int) -> GlobalBatch:
    """Return a batch, or a collection of one for each loader, as one for the loop.

    A micro-batch is then such a collection, too. Raises OwnCodeError.
    """
    leaves, structure = tree_flatten(batch)
    found = [leaf.take() if isinstance(leaf, Batch) else leaf for leaf in leaves]
    batches = [each for each in found if isinstance(each, GlobalBatch)]
    if not batches or any(not isinstance(x, GlobalBatch | None) for x in found):
        raise OwnCodeError(
            "Each step has a batch of a DataLoader, or a collection of such batches; "
            f"received {type(batch).__name__}."
        )
    _check_alike([each.size for each in batches], micro_batches)

    def fetch(m: int) -> Any:
        return tree_unflatten([x and x.fetch(m) for x in found], structure)

    return GlobalBatch(batches[0].size, fetch)


def _check_alike(sizes: list[int], micro_batches: int) -> None:
    """Raise OwnCodeError unless each micro-batch has the same share of all batches."""
    first, *others = (lengths(shares(size, micro_batches)) for size in sizes)
    for size, pieces in zip(sizes[1:], others, strict=True):
        if any(a * size != b * sizes[0] for a, b in zip(first, pieces, strict=True)):
            raise OwnCodeError(
                "Losses of several loaders are means over batches that are divided "
                f"alike: of the same size, or of multiples of {micro_batches} "
                f"micro-batches; received {', '.join(map(str, sizes))} samples. Choose "
                "such batch sizes, and `drop_last=True`."
            )
