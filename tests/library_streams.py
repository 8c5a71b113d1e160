"""Streams of other libraries, each of the same hundred samples."""

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


COUNT, SHARDS = 100, 4
DIRECTORY = "."
generator = torch.Generator().manual_seed(0)
LABELS = torch.arange(COUNT) % 3
INPUTS = torch.randn(COUNT, 5, generator=generator)
INPUTS[torch.arange(COUNT), LABELS] += 2


def sample(index: int) -> dict[str, Any]:
    return {"x": INPUTS[index], "label": int(LABELS[index])}


def hugging_face() -> Any:
    from datasets import Dataset

    rows = Dataset.from_dict({"x": INPUTS.tolist(), "label": LABELS.tolist()})
    return rows.to_iterable_dataset(num_shards=SHARDS).with_format("torch")


def hugging_face_shuffled() -> Any:
    """Shards and a buffer are shuffled anew in each epoch."""
    return hugging_face().shuffle(seed=3, buffer_size=16)


def stateful_loader() -> Any:
    """With a process that loads ahead."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader(hugging_face(), 16, num_workers=1)


def stateful_loader_shuffled() -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    return StatefulDataLoader([sample(i) for i in range(COUNT)], 16, shuffle=True)


def nodes() -> Any:
    from torchdata import nodes as n

    return n.Loader(n.Mapper(n.IterableWrapper(range(COUNT)), sample))


def nodes_in_threads() -> Any:
    from torchdata import nodes as n

    samples = n.IterableWrapper(range(COUNT))
    ahead = n.ParallelMapper(samples, sample, num_workers=2, method="thread")
    return n.Loader(n.Prefetcher(ahead, 8))


def web_dataset() -> Any:
    """Tar files, not divided between workers, and shuffled with a seeded generator."""
    from webdataset import WebDataset

    shards = [f"{DIRECTORY}/{number}.tar" for number in range(SHARDS)]
    files = WebDataset(shards, shardshuffle=False, nodesplitter=lambda urls: urls)
    return files.shuffle(20, rng=random).decode().to_tuple("x.npy", "y.cls")


def write_shards(directory: Path) -> None:
    """Write the samples into tar files."""
    for number in range(SHARDS):
        with tarfile.open(directory / f"{number}.tar", "w") as shard:
            for index in range(number, COUNT, SHARDS):
                values = io.BytesIO()
                np.save(values, INPUTS[index].numpy())
                for name, content in (
                    ("x.npy", values.getvalue()),
                    ("y.cls", str(int(LABELS[index])).encode()),
                ):
                    file = tarfile.TarInfo(f"{index:03}.{name}")
                    file.size = len(content)
                    shard.addfile(file, io.BytesIO(content))


STREAMS: dict[str, tuple[Callable[[], Any], str]] = {
    "hugging face": (hugging_face, "datasets"),
    "hugging face, shuffled": (hugging_face_shuffled, "datasets"),
    "stateful loader": (stateful_loader, "torchdata"),
    "stateful loader, shuffled": (stateful_loader_shuffled, "torchdata"),
    "nodes": (nodes, "torchdata"),
    "nodes in threads": (nodes_in_threads, "torchdata"),
    "web dataset": (web_dataset, "webdataset"),
}
"""Each with the library that it needs."""


def load(kind: str) -> Any:
    return {"train": STREAMS[kind][0]()}
