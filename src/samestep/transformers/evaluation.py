"""An evaluation whose batches are divided among the processes, and known to all."""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch.utils.data import DataLoader

from samestep.data.batches import evaluation_batches
from samestep.data.given import GivenData
from samestep.errors import OwnCodeError
from samestep.user_code import seeding


Prediction = tuple[Any, Any, Any]
"""Loss, logits and labels."""


class Predicted(dict[str, Any]):
    """The inputs of a batch, as far as others need them, and what was predicted."""

    def __init__(
        self, inputs: Mapping[str, Any], size: int, result: Prediction
    ) -> None:
        super().__init__(inputs or {"samples": torch.empty(size, 0)})
        self.size, self.result = size, result


class Evaluation(DataLoaderStateMixin):  # type: ignore[misc]
    """What the evaluation loop of Transformers takes for a DataLoader.

    Each batch is predicted by one process, and yielded by all of them, in order.
    """

    def __init__(
        self,
        loader: Any,
        place: tuple[int, int],
        seed: int,
        predict: Callable[[Any], tuple[Mapping[str, Any], Prediction]],
    ) -> None:
        """`predict` returns the inputs to keep, and the result. Raises OwnCodeError."""
        if not isinstance(loader, DataLoader):
            raise OwnCodeError(
                "Batches of an evaluation are those of a DataLoader; received "
                f"{type(loader).__name__}."
            )
        self._loader, self._place, self._seed = loader, place, seed
        self._predict = predict
        self.dataset = loader.dataset
        self.gradient_state = GradientState()

    def __len__(self) -> int:
        """Return how many batches there are. Raises TypeError for a stream."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Predicted]:
        """All processes: yield what any of them has predicted."""
        self.begin()
        for batch, following in pairwise(self._all_and_none()):
            assert batch is not None
            if following is None:
                # Transformers keeps as many losses of the last batch.
                self.end_of_dataloader, self.remainder = True, batch.size
            yield batch
        self.end()

    def _all_and_none(self) -> Iterator[Predicted | None]:
        """Yield all batches, and None at their end."""
        rank, workers = self._place
        source = GivenData.of(self._loader, None, None)
        own, index = None, -1
        for index, size, fetch in evaluation_batches(source, self._seed, rank, workers):
            if fetch is not None:
                with seeding.kept():
                    inputs, result = self._predict(fetch())
                own = Predicted(inputs, size, result)
            if (index + 1) % workers == 0:
                yield from self._gather(own)
        yield from self._gather(own)[: (index + 1) % workers]
        yield None

    def _gather(self, own: Predicted | None) -> list[Predicted]:
        """All processes: return everyone's latest batch, by rank."""
        workers = self._place[1]
        every: list[Any] = [own] * workers
        if workers > 1:
            dist.all_gather_object(every, own)
        return every
