"""What safety costs: snapshots and checkpoints, the probe, watching own code.

    python benchmarks/safety.py
    python benchmarks/safety.py probe
    python benchmarks/safety.py watching

`snapshots` (the default) and `probe`: a round trains the same recipe with and without
them, one after the other; `probe` trains a model of your own. The time runs from the
first step to the end of the last epoch, evaluation included, as events.jsonl has it, so
that what they do at the end of an epoch counts too; what the end waits for the witness
does not. The cost is the ratio within a round, minus one; the order
alternates from round to round. Standstill is the share of that time in which rank 0
copied snapshots instead of training.

`watching`: in this process, forward and backward passes of micro-batches of 16 samples
through three models, with and without looking at their tensors, taking turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cleanup
import torch
from torch import Tensor, nn

from samestep.state.flat import Flat
from samestep.verification.mutation_check import MutationCheck


OFF = {"snapshots": ("--snapshot-seconds", "0"), "probe": ("--no-probe",)}
OPTIONS = {"snapshots": (), "probe": ("--model", "safety:build")}


def build(inputs: tuple[int, ...], outputs: int) -> nn.Module:
    """The network of `mnist-mlp-classic`, as one's own."""
    wide = nn.Linear(inputs[1] * inputs[2], 512)
    layers = wide, nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, outputs)
    return nn.Sequential(nn.Flatten(), *layers)


def convolutions() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 8, 3)]
    for _ in range(5):
        layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


def encoder() -> nn.Module:
    """Four layers, of which two are frozen."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(nn.Linear(28, 64), nn.TransformerEncoder(layer, 4))
    frozen = model[1].get_submodule("layers")
    assert isinstance(frozen, nn.ModuleList)
    for each in frozen[:2]:
        each.requires_grad_(False)
    return model


WATCHED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: build((1, 28, 28), 10), (16, 1, 28, 28)),
    "convolutions": (convolutions, (16, 1, 28, 28)),
    "encoder, half of it frozen": (encoder, (16, 28, 28)),
}


def seconds(run: Path, *options: str) -> tuple[float, float]:
    """One training, from its first step to its last epoch's end; its standstill."""
    command = [sys.executable, "-m", "samestep", "train", "--out", str(run)]
    command += ["--no-report", *options]
    ended = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=Path(__file__).parent
    )
    if ended.returncode:
        raise SystemExit(f"a training failed: {ended.stderr}")
    lines = (run / "events.jsonl").read_text().splitlines()
    times = {event["event"]: event["seconds"] for event in map(json.loads, lines)}
    standstill = json.loads((run / "result.json").read_text())["snapshot_seconds"]
    return times["epoch"] - times["training"], standstill


def train(what: str, rounds: int, options: list[str]) -> None:
    """Print what it costs, of a whole training."""
    ratios, shares = [], []
    for index in range(rounds):
        with tempfile.TemporaryDirectory() as directory:
            found = {}
            for name in ("off", "on")[:: 1 if index % 2 else -1]:
                extra = OFF[what] if name == "off" else ()
                run = Path(directory) / name
                found[name] = seconds(run, *OPTIONS[what], *options, *extra)
        (on, standstill), (off, _) = found["on"], found["off"]
        ratios.append(on / off)
        shares.append(standstill / on)
        print(f"round {index + 1}: on {on:.2f} s  off {off:.2f} s", flush=True)
    print(f"cost: {spread([ratio - 1 for ratio in ratios])}")
    if what == "snapshots":
        print(f"standstill: {spread(shares)}")


def watch(rounds: int, passes: int) -> None:
    """Print what it costs, of so many passes in a row, forward and backward alone."""
    torch.set_num_threads(1)
    for name, (make, shape) in WATCHED.items():
        inputs = torch.randn(shape)
        model = make()
        model(inputs)  # a lazy layer takes its shape
        mutation_check = MutationCheck(model, Flat(model), name)
        ratios = []
        for index in range(rounds + 1):  # the first warms up
            times = {}
            for is_on in (True, False)[:: 1 if index % 2 else -1]:
                began = time.perf_counter()
                for _ in range(passes):
                    step(model, inputs)
                    if is_on:
                        mutation_check.check()
                    mutation_check.note()
                times[is_on] = time.perf_counter() - began
            ratios.append(times[True] / times[False] - 1)
        print(f"{name}, {1e3 * times[False] / passes:.2f} ms: {spread(ratios[1:])}")


def step(model: nn.Module, inputs: Tensor) -> None:
    model(inputs).sum().backward()
    model.zero_grad()


def spread(values: list[float]) -> str:
    return (
        f"median {statistics.median(values):.2%}, {min(values):.2%} to "
        f"{max(values):.2%}, n={len(values)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = [*OFF, "watching"]
    parser.add_argument("what", nargs="?", choices=choices, default="snapshots")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    arguments = parser.parse_args()
    options = ["--epochs", str(arguments.epochs), "--workers", str(arguments.workers)]
    options += [word for change in arguments.set for word in ("--set", change)]
    if arguments.what == "watching":
        watch(arguments.rounds, arguments.passes)
    else:
        train(arguments.what, arguments.rounds, options)


if __name__ == "__main__":
    cleanup.run(main)
