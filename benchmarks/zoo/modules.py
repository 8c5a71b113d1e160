"""Modules of libraries in tiny configurations, with random weights; no types here.

Nothing is downloaded. Each is made of a function without arguments; libraries are
imported when they are needed.
"""

import torch
from torch import nn
from torch.nn import functional


CLASSES, TOKENS, LENGTH, SAMPLES = 3, 30, 12, 56


# Data: 48 for training (3 steps an epoch), 8 for a test.


def split(x, y):
    cut = SAMPLES - 8
    return {"train": (x[:cut], y[:cut]), "test": (x[cut:], y[cut:])}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def labels():
    return torch.arange(SAMPLES) % CLASSES


def images(channels=3, size=32):
    x = noise(SAMPLES, channels, size, size)
    return split(x + labels().view(-1, 1, 1, 1), labels())


def large_images():
    return images(size=64)


def small_images():
    return images(1, 16)


def pixels():
    """Every pixel has a class: as many outputs as there are pixels and classes."""
    x = noise(SAMPLES, 3, 32, 32)
    return split(x, (x.sum(1) > 0).long().flatten(1))


def table():
    x = noise(SAMPLES, 8)
    x[:, :3] += functional.one_hot(labels(), CLASSES)
    return split(x, labels())


def values():
    x = noise(SAMPLES, 2)
    return split(x, torch.sin(x.sum(1, keepdim=True)))


def itself():
    x = noise(SAMPLES, 8)
    return split(x, x.clone())


def text():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(TOKENS, (SAMPLES, LENGTH + 1), generator=generator)
    x[0, 0] = TOKENS - 1
    return split(x[:, :-1], x[:, 1:])


def sentences():
    x = torch.randint(TOKENS, (SAMPLES, LENGTH), generator=torch.Generator())
    x[:, 0] = labels()
    return split(x, labels())


def series():
    x = noise(SAMPLES, LENGTH, 4).cumsum(1) + labels().view(-1, 1, 1)
    return split(x, labels())


def sound():
    return split(noise(SAMPLES, 800) + labels().view(-1, 1), labels())


# How the outputs and losses of libraries become what `train` takes.


class Logits(nn.Module):
    """Hugging Face's models return an object with `logits`."""

    def __init__(self, model, **more):
        super().__init__()
        self.model, self.more = model, more

    def forward(self, x):
        return self.model(x, **self.more).logits


class Through(nn.Module):
    """An input or an output of another form."""

    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model = model
        self.before, self.after = before or nn.Identity(), after or nn.Identity()

    def forward(self, x):
        return self.after(self.model(self.before(x)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def first(model):
    """Return a model that has only the first of several outputs."""
    return Through(model, after=Call(lambda found: found[0]))


def by_pixel(model):
    """[b, classes, h, w] -> [b, h * w, classes]."""
    return Through(model, after=Call(lambda y: y.flatten(2).transpose(1, 2)))
