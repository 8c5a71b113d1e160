"""Models with a memory that is no buffer, or that read what depends on the process."""

import collections
import datetime
import functools
import math
import os
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from kinds.plain import HIDDEN, Net


LATE = 30
"""A short look does not see what begins with this call."""


class NumpyNoise(Net):
    def middle(self, h):
        return h + float(np.random.rand())


class FreshNoise(Net):
    def middle(self, h):
        return h + float(np.random.default_rng().random())


GENERATOR = torch.Generator().manual_seed(1)


class ImportedGenerator(Net):
    """A generator that was seeded once, when the module was imported."""

    def middle(self, h):
        return h + torch.rand(h.shape, generator=GENERATOR)


class OwnGenerator(Net):
    """numpy's generator as an attribute: copied and pickled with its state."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def middle(self, h):
        return h + float(self.rng.random())


class Counter(Net):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def middle(self, h):
        self.calls += 1
        return h + 0.01 * self.calls


class LateCounter(Counter):
    def middle(self, h):
        self.calls += 1
        return h * 1.1 if self.calls > LATE else h


class ClassCounter(Net):
    """One number for all objects of the class."""

    calls = 0

    def middle(self, h):
        ClassCounter.calls += 1
        return h * 1.1 if ClassCounter.calls > LATE else h


class Annealed(Net):
    """A global step that training passes count up, for a temperature."""

    def __init__(self):
        super().__init__()
        self.step = 0

    def forward(self, x):
        if self.training:
            self.step += 1
        return super().forward(x) / (1 + math.exp(-self.step / 50))


class MemoryBank(Net):
    """The last 32 activations, in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.bank = torch.zeros(0, HIDDEN)

    def middle(self, h):
        if self.training:
            self.bank = torch.cat([self.bank, h.detach()])[-32:]
        return h - self.bank.mean(0) if len(self.bank) == 32 else h


class Recent(Net):
    """The last means in a deque, as in many repositories of contrastive learning."""

    def __init__(self):
        super().__init__()
        self.recent = collections.deque(maxlen=16)

    def middle(self, h):
        if self.training:
            self.recent.append(h.detach().mean(0))
        full = len(self.recent) == self.recent.maxlen
        return h - torch.stack(list(self.recent)).mean(0) if full else h


class Defaults(Net):
    """A mutable default argument remembers."""

    def middle(self, h, seen=[]):  # noqa: B006
        seen.append(h.detach().mean())
        return h + torch.stack(seen[-8:]).mean() if len(seen) > 8 else h


TABLE = torch.zeros(HIDDEN)


class GlobalTensor(Net):
    """A tensor of the module's, changed in place."""

    def middle(self, h):
        if self.training:
            TABLE.lerp_(h.detach().mean(0), 0.1)
        return h - TABLE


@functools.lru_cache
def scale(size):
    """Drawn once for each size."""
    return torch.rand(HIDDEN) + size / 100


class CachedBySize(Net):
    """A cache whose content depends on what was drawn when it was filled."""

    def middle(self, h):
        return h * scale(len(h))


class CompiledByShape(Net):
    """As a compiler does: the first call measures, later ones use what it found."""

    def __init__(self):
        super().__init__()
        self.kernels = {}

    def middle(self, h):
        key = tuple(h.shape)
        if key not in self.kernels:
            self.kernels[key] = float(h.detach().abs().amax())
        return h / (self.kernels[key] + 1)


class Lazy(Net):
    """Normalised by what the first pass saw."""

    def __init__(self):
        super().__init__()
        self.shift = None

    def middle(self, h):
        if self.shift is None:
            self.shift = h.detach().mean(0)
        return h - self.shift


class MomentumEncoder(Net):
    """MoCo: a frozen copy of the body follows it, in `forward`."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(*reversed(self.body.weight.shape))
        self.teacher.load_state_dict(self.body.state_dict())
        self.teacher.requires_grad_(False)

    def follow(self):
        pairs = zip(self.teacher.parameters(), self.body.parameters(), strict=True)
        for mine, theirs in pairs:
            mine.mul_(0.99).add_(0.01 * theirs)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.follow()
        return self.head(torch.relu(self.body(x)) + torch.relu(self.teacher(x)))


class TeacherInHook(MomentumEncoder):
    """The same from a forward hook, after each training pass."""

    def __init__(self):
        super().__init__()
        self.register_forward_hook(self.after)

    def after(self, module, inputs, outputs):
        if self.training:
            with torch.no_grad():
                MomentumEncoder.follow(self)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)) + torch.relu(self.teacher(x)))


class Swapped(Net):
    """Two frozen layers change places in every pass."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)
        self.two = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)

    def middle(self, h):
        self.one, self.two = self.two, self.one
        return h + self.one(h)


class LateBuffer(Net):
    """A buffer that is not persistent, and that only long inputs change (rope)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("longest", torch.zeros(()), persistent=False)

    def middle(self, h):
        size = h.detach().abs().amax()
        if size > 2.5 and self.training:
            self.longest.copy_(torch.maximum(self.longest, size))
        return h / (1 + self.longest)


class Dated(Net):
    def middle(self, h):
        return h + datetime.datetime.now().microsecond % 97 / 97


class Timed(Net):
    """As long as it is young, a process behaves in another way."""

    born = time.monotonic()

    def middle(self, h):
        return h * (1 + (time.monotonic() - self.born))


class ByRank(Net):
    def middle(self, h):
        return h + int(os.environ.get("RANK", "0")) / 10


class ById(Net):
    """Layers in the order of their addresses."""

    def __init__(self):
        super().__init__()
        self.noise = os.urandom(1)[0]  # so that addresses move, as they do in life
        self.ballast = [object() for _ in range(self.noise)]
        layers = {id(key): key for key in (object() for _ in range(8))}
        self.order = [layers[key] for key in sorted(layers)]

    def middle(self, h):
        return h + id(self.order[0]) // 64 % 7 / 10


class SetOrder(Net):
    """What a set of strings gives first depends on the hash seed of the process."""

    def middle(self, h):
        for name in {"shift", "scale", "square", "double", "negate"}:
            h = h + 1 if name == "shift" else h * 1.1 if name == "scale" else h
        return h


FILE = tempfile.TemporaryFile()  # noqa: SIM115


class FileMemory(Net):
    """Written in one pass, and read back in the next."""

    def middle(self, h):
        FILE.seek(0)
        text = FILE.read()
        before = float(text) if text else 0.0
        FILE.seek(0)
        FILE.write(f"{h.detach().mean():012.9f}".encode())
        return h - before


class Racing(Net):
    """The first of three threads decides; all begin at once, on a busy machine, too."""

    def middle(self, h):
        order, start = [], threading.Barrier(3)

        def arrive(number):
            start.wait()
            time.sleep(os.urandom(1)[0] / 1e5)
            order.append(number)

        threads = [threading.Thread(target=arrive, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return h * (1 + order[0] / 10)


class Pool(Net):
    """Parts of a sum in the order in which a pool finishes them."""

    def middle(self, h):
        start = threading.Barrier(4)

        def part(number):
            start.wait()
            time.sleep(os.urandom(1)[0] / 1e5)
            return h * 0.1 * 1.7**number

        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(part, number) for number in range(4)]
            done = [job.result() for job in as_completed(jobs)]
        return functools.reduce(torch.add, done) + done[0]


class DropsByProcess(Net):
    """Dropout with a probability that the process id decides."""

    def middle(self, h):
        return functional.dropout(h, os.getpid() % 5 / 10, self.training)
