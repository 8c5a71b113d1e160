"""One global batch in a script's own loop: an iteration for each own micro-batch."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from samestep.data.batches import GlobalBatch
from samestep.data.given import GivenData
from samestep.data.stream import Bookmark
from samestep.errors import OwnCodeError
from samestep.loop.loop import Loop
from samestep.user_code import seeding


Fetch = Callable[[], Any]


class Step:
    """The own micro-batches of a global batch, and the sum of all at their end.

    A process without samples in it, as in a short last batch, has one iteration, too:
    what it computes there is left out, and then it makes the step of all.
    """

    def __init__(self, loop: Loop, batch: GlobalBatch, own: int, spare: Any) -> None:
        """Begin with the first of the `own` micro-batches that have samples.

        `spare` are the model and the loader for an iteration without samples.
        """
        self._loop = loop
        self.is_left_out = own == 0
        """Whether there are no samples for this process."""
        self.left = max(own, 1)
        """How many iterations are to come, with the current one."""
        self.is_update = True
        """Whether the optimizer makes its step after this global batch."""
        self.following: tuple[int, int, Bookmark | None] = 0, 0, None
        """Epoch and step that come after it, and where a stream was before it."""
        # The loop yields what loads a micro-batch. So `backward` can give it a gradient
        # at once, and the generators are seeded at the start of the next iteration.
        lazy = batch._replace(fetch=lambda m: partial(batch.fetch, m))
        self._pieces: Iterator[Fetch] = (
            loop.step(lazy) if own else _without_samples(loop, batch, *spare)
        )
        self._fetch: Fetch | None = next(self._pieces)
        self.samples = 0
        """How many the current micro-batch has."""
        self.has_gradient = False
        """Whether it is done with."""

    @property
    def is_last(self) -> bool:
        """Whether the current micro-batch is the last of this process."""
        return self.left == 1

    @property
    def is_whole(self) -> bool:
        """Whether `grad` is that of the global batch, the same in every process."""
        return self.left == 0

    def __iter__(self) -> Iterator[Any]:
        """Load and yield the micro-batches.

        Raises OwnCodeError if one is to follow on another that has no gradient.
        """
        while (fetch := self._fetch) is not None:
            self.samples, self.has_gradient = self._loop.samples, False
            yield fetch()
            if not self.has_gradient:
                raise OwnCodeError(
                    "In a training, each iteration calls `accelerator.backward` once, "
                    "and one has not. (To evaluate, call `model.eval()` before the "
                    "loop.)"
                )

    def go_on(self) -> None:
        """Take the gradient of the current micro-batch; after the last, sum all."""
        self._fetch, self.has_gradient = next(self._pieces, None), True
        self.left -= 1


def _without_samples(
    loop: Loop, batch: GlobalBatch, model: nn.Module, loader: DataLoader[Any]
) -> Iterator[Fetch]:
    """Let a script compute something that leaves no trace, then take part in the sum.

    Two samples, since one is not enough for BatchNorm.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    data: Any = loader.dataset
    with seeding.kept():
        if GivenData.of(loader, None, None).is_stream:
            samples = list(islice(iter(data), 2))
        else:
            samples = [data[i] for i in range(min(2, len(data)))]
        yield lambda: loader.collate_fn(samples)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    yield from loop.step(batch)
