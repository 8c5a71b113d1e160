"""Data of many kinds."""

import functools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from kinds.plain import CLASSES, WIDTH, samples, split


class Samples(Dataset):
    """A split as a map-style data set; who names its classes, spares a pass."""

    classes = ("red", "green", "blue")

    def __init__(self, x, y):
        self.x, self.y = x.clone(), y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index] + self.noise(index), int(self.y[index])

    def noise(self, index):
        """For the kinds to replace."""
        return 0.0


def of(kind):
    """What `load` returns for a class of samples: training samples have the noise."""
    parts = split(*samples())
    return {"train": kind(*parts["train"]), "test": Samples(*parts["test"])}


class Drawing(Samples):
    """From all three global generators, as augmentations do."""

    def noise(self, index):
        return random.random() + np.random.rand() + torch.rand(()).item()


class Threaded(Samples):
    """Read by threads, and put into order."""

    def noise(self, index):
        with ThreadPoolExecutor(2) as pool:
            return sum(pool.map(float, range(index % 3))) / 10


class OwnGenerator(Samples):
    def __init__(self, x, y):
        super().__init__(x, y)
        self.rng = np.random.default_rng(0)

    def noise(self, index):
        return float(self.rng.random())


class InPlace(Samples):
    """Every look at a sample changes it."""

    def noise(self, index):
        self.x[index] *= 1.1
        return 0.0


class Cache(Samples):
    """What was drawn first is kept."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.kept = {}

    def noise(self, index):
        return self.kept.setdefault(index, torch.rand(()).item())


class CachedFunction(Samples):
    def noise(self, index):
        return drawn(index // 4)


@functools.cache
def drawn(group):
    """One number for four samples, whoever asks first."""
    return torch.rand(()).item()


class EpochByCalls(Samples):
    """Counts its calls to know how far the epoch is: 204 samples are one."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.calls = 0

    def noise(self, index):
        self.calls += 1
        return self.calls // 51 / 4


class Popping(Samples):
    """Each sample is taken out of a list."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.left = list(range(len(y))) * 40

    def __getitem__(self, index):
        index = self.left.pop()
        return self.x[index], int(self.y[index])


class Hashed(Samples):
    """Python's hash of a string, which another process has otherwise."""

    def noise(self, index):
        return hash(f"sample-{index}") % 7 / 10


def drawing():
    return of(Drawing)


def threaded():
    return of(Threaded)


def own_generator():
    return of(OwnGenerator)


def in_place():
    return of(InPlace)


def cache():
    return of(Cache)


def cached_function():
    return of(CachedFunction)


def epoch_by_calls():
    return of(EpochByCalls)


def popping():
    return of(Popping)


def hashed():
    return of(Hashed)


def generator():
    """A stream that can be read once."""
    return (sample for sample in Samples(*samples()))


def shuffled(order):
    x, y = samples()
    return split(x[order], y[order])


def python_shuffle():
    order = list(range(250))
    random.shuffle(order)
    return shuffled(order)


def numpy_permutation():
    return shuffled(np.random.permutation(250))


def torch_permutation():
    return shuffled(torch.randperm(250))


def fresh_permutation():
    """From a generator that the system seeds."""
    return shuffled(np.random.default_rng().permutation(250))


def vocabulary():
    """Words become numbers in the order of a set."""
    x, y = samples()
    words = ["red", "green", "blue"]
    numbers = {word: number for number, word in enumerate(list(set(words)))}
    return split(x, torch.tensor([numbers[words[label]] for label in y]))


def length_by_process():
    x, y = samples()
    parts = split(x, y)
    parts["train"] = tuple(part[: 204 - os.getpid() % 9] for part in parts["train"])
    return parts


def length_by_rank():
    parts = split(*samples())
    end = 204 - 8 * int(os.environ.get("RANK", "0"))
    parts["train"] = tuple(part[:end] for part in parts["train"])
    return parts


def samples_by_rank():
    """Everybody has data of their own, as if this were DDP with a sampler."""
    x, y = samples()
    return split(x.roll(int(os.environ.get("RANK", "0")), 0), y)


def with_mask():
    """As a tokenizer gives them: the tokens alone are not the input."""
    x, y = samples()
    mask = (
        torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    ).long()
    return [
        {"input_ids": x[i], "attention_mask": mask[i], "label": int(y[i])}
        for i in range(len(y))
    ]


def complex_numbers():
    x, y = samples()
    return split(torch.complex(x, x.flip(1)), y)


def bools():
    x, y = samples()
    return split(x > 0, y)


def ragged():
    """The last sample is shorter; a look at the first ones does not show it."""
    x, y = samples()
    return [
        (x[i, : WIDTH - (i == len(y) - 1)], int(y[i]) % CLASSES) for i in range(250)
    ]
