"""Data as training scripts have them: samples with an index, a stream, a DataLoader."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from samestep.data.loading import Collate
from samestep.errors import OwnCodeError


@dataclass(frozen=True)
class GivenData:
    """Samples, how many make up a global batch, and how they are put together."""

    data: Any
    global_batch: int | None
    """None if a batch sampler decides."""
    collate: Collate
    loader: DataLoader[Any] | None = None

    @classmethod
    def of(
        cls, data: Any, global_batch: int | None, collate: Collate | None
    ) -> "GivenData":
        """Take a DataLoader apart; anything else is taken as it is.

        Raises OwnCodeError.
        """
        if not isinstance(data, DataLoader):
            if global_batch is None or global_batch < 1:
                raise OwnCodeError(
                    "Samples are cut into global batches; say of how many samples: "
                    f"`steps(data, 64, epoch)`. Received {global_batch}. (A DataLoader "
                    "has its `batch_size`.)"
                )
            return cls(data, global_batch, collate or default_collate)
        if global_batch is not None or collate is not None:
            raise OwnCodeError(
                "A DataLoader says itself how many samples a global batch has and how "
                "they are put together: leave out `global_batch` and `collate`."
            )
        if data.batch_size is None and data.batch_sampler is None:
            raise OwnCodeError(
                "The global batch is the DataLoader's `batch_size`, and this one has "
                "`batch_size=None`. Give a number, and yield single samples."
            )
        _refuse_distributed(data)
        return cls(data.dataset, data.batch_size, data.collate_fn, data)

    @property
    def is_stream(self) -> bool:
        """Whether the samples have no index."""
        return isinstance(self.data, IterableDataset) or not hasattr(
            self.data, "__getitem__"
        )

    @property
    def is_ordered_by_others(self) -> bool:
        """Whether a sampler of the user's decides about the order."""
        kinds = (BatchSampler, RandomSampler, SequentialSampler)
        loader = self.loader
        return loader is not None and not (
            type(loader.batch_sampler) in kinds and type(loader.sampler) in kinds
        )

    @property
    def has_processes(self) -> bool:
        """Whether samples are to be loaded ahead, by processes of their own."""
        return self.loader is not None and self.loader.num_workers > 0

    @property
    def drops_last(self) -> bool:
        """Whether a last batch with fewer samples is left out."""
        return self.loader is not None and bool(self.loader.drop_last)


def _refuse_distributed(loader: DataLoader[Any]) -> None:
    samplers = loader.sampler, getattr(loader.batch_sampler, "sampler", None)
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise OwnCodeError(
            "Each worker is given its samples, and the DistributedSampler of this "
            "DataLoader would divide them again. Use `shuffle=True` instead."
        )


def set_epoch(owner: Any, epoch: int) -> None:
    """Tell samplers and streams that shuffle by epoch which one it is."""
    function = getattr(owner, "set_epoch", None)
    if callable(function):
        function(epoch)
