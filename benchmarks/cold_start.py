"""What comes before the first step with portable arithmetic, beside that with torch's.

    python benchmarks/cold_start.py --rounds 5

Portable arithmetic records a model, lowers the recording to a program, and compares
it with PyTorch. A round trains every model with both arithmetics, one after the other,
by one worker and by two; torch is imported before. Counted is what passes from the call
until the first step is reported: seconds on the clock, and those of all processors
together.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cleanup
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

import samestep
from samestep.messages.training import Message, StepRecord
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


SAMPLES, CLASSES, WIDTH = 64, 10, 64


class Transformer(nn.Module):
    """Twelve layers of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 12)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [b, t, width] to [b, classes]."""
        return torch.as_tensor(self.last(self.encoder(tokens).mean(1)))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        stride = 1 if inputs == channels else 2
        self.first = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.short = nn.Conv2d(inputs, channels, 1, stride, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Map images to images, of half the size if there are more channels."""
        y = functional.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y)) + self.norms[2](self.short(x))
        return functional.relu(y)


def resnet() -> nn.Module:
    """Return a residual network of 18 layers."""
    channels = (16, 16, 16, 32, 32, 64, 64, 128, 128)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *map(Block, channels, channels[1:]),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, CLASSES)),
    )


class Recurrent(nn.Module):
    """Two layers of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, t, width] to [b, classes]."""
        return torch.as_tensor(self.last(self.lstm(x)[0][:, -1]))


class Unrolled(nn.Module):
    """A gated cell, called for each step: thousands of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = (nn.Linear(WIDTH, 4 * WIDTH) for _ in range(2))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, t, width] to [b, classes]."""
        state = cell = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            gates = (self.inputs(step) + self.state(state)).chunk(4, 1)
            keep, write, out = map(torch.sigmoid, gates[:3])
            cell = keep * cell + write * torch.tanh(gates[3])
            state = out * torch.tanh(cell)
        return torch.as_tensor(self.last(state))


def of(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return data of such samples: one step of a training."""
    return {"train": (torch.randn(SAMPLES, *shape), torch.arange(SAMPLES) % CLASSES)}


MODELS: dict[str, dict[str, Any]] = {
    "transformer": {"model": Transformer, "data": of((16, WIDTH))},
    "resnet": {"model": resnet, "data": of((3, 32, 32))},
    "lstm": {"model": Recurrent, "data": of((100, WIDTH))},
    "unrolled": {"model": Unrolled, "data": of((100, WIDTH))},
    "mnist-cnn": {"recipe": "mnist-cnn", "data__train_samples": SAMPLES},
}


class FirstStep(SilentView):
    """Notes when the first step is reported."""

    def __init__(self) -> None:
        self.began, self.found = spent(), (0.0, 0.0)

    def receive(self, message: Message) -> None:
        """Note the seconds since the beginning, if this is the first step."""
        if isinstance(message, StepRecord) and self.found == (0.0, 0.0):
            pairs = zip(spent(), self.began, strict=True)
            wall, processors = (now - before for now, before in pairs)
            self.found = wall, processors


def spent() -> tuple[float, float]:
    """Return the time, and the seconds of processors of all processes from here on."""
    times = [p.cpu_times() for p in psutil.Process().children(recursive=True)]
    below = sum(sum(part[:4]) for part in times)
    return time.perf_counter(), time.process_time() + below


def start(given: dict[str, Any], workers: int, server: ForkServer) -> FirstStep:
    """Train one epoch, of one step or few."""
    with tempfile.TemporaryDirectory() as directory:
        view = FirstStep()
        fields = {"epochs": 1, "global_batch": SAMPLES, "micro_batches": 4, **given}
        samestep.train(
            **fields,
            workers=workers,
            out=Path(directory) / "run",
            view=view,
            server=server,
        )
        return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="; ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    found = defaultdict[tuple[str, int], list[tuple[float, ...]]](list)
    with ForkServer() as server:
        start(MODELS["lstm"], 1, server)  # waits for the import of torch
        for _ in range(arguments.rounds):
            for name in arguments.models or MODELS:
                for workers in arguments.workers:
                    (a, b), (c, d) = (
                        start(
                            MODELS[name] | {"arithmetic": kind}, workers, server
                        ).found
                        for kind in ("portable", "torch")
                    )
                    found[name, workers].append((a, c, a - c, b - d))
    print("model, workers: seconds, with torch, more on the clock, more of processors")
    for (name, workers), rows in found.items():
        medians = [statistics.median(part) for part in zip(*rows, strict=True)]
        numbers = "  ".join(f"{median:.2f}" for median in medians)
        print(f"{name}, {workers}: {numbers}, n={len(rows)}")


if __name__ == "__main__":
    cleanup.run(main)
