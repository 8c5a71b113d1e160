"""Kills a training on a stream again and again, and reads in its weights what it saw.

    python benchmarks/streams.py
    python benchmarks/streams.py again --kills 5 --samples 4000

A stream that does not tell its length is trained to its end. When it was read up to a
step that the seed has drawn, the whole training gets SIGKILL, and `samestep resume`
goes on with a random number of workers over a random exchange. With `state` the stream
has a `state_dict`, without, as with `again`, it is read again from its start.

Each sample has a weight of its own, which begins with zero. SGD moves it in the step
that has the sample, and weight decay multiplies it in all later ones, so the weights
say which samples were trained in which step, and how often. All must be those of the
sample's position, and the fingerprint that of a training that is left alone.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cleanup
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from samestep.state import checkpoint


GLOBAL_BATCH = 16
DECAY = 1e-3
"""The share of each weight that a step takes away."""
SECONDS = 1e-3
"""How long the stream takes for a sample, at least."""
DEADLINE = 300.0
POLL_SECONDS = 0.01
Sample = tuple[Tensor, Tensor]


class Numbers(IterableDataset[Sample]):
    """The numbers below a length, which it does not tell.

    It writes into a file how far it was read.
    """

    def __init__(self, samples: int, progress: str) -> None:
        self._samples, self._progress = samples, Path(progress)
        self._next = self._start = 0

    def __iter__(self) -> Iterator[Sample]:
        self._next, self._start = self._start, 0
        while self._next < self._samples:
            time.sleep(SECONDS)
            number, self._next = self._next, self._next + 1
            if number % GLOBAL_BATCH == 0:
                self._progress.write_text(str(number // GLOBAL_BATCH))
            yield torch.tensor([number]), torch.zeros(1)


class Told(Numbers):
    """The same, and it can say where it is."""

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._start = state["next"]


def load(samples: int, has_state: bool, progress: str) -> Numbers:
    return (Told if has_state else Numbers)(samples, progress)


def build(samples: int) -> nn.Module:
    """One weight for each sample, and some for others that never come."""
    table = nn.Embedding(samples + 7, 1)
    nn.init.zeros_(table.weight)
    return nn.Sequential(table, nn.Flatten())


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).sum()


def steps_in(samples: int) -> int:
    return -(-samples // GLOBAL_BATCH)


def steps_of(weights: Tensor, samples: int) -> list[float]:
    """Return from the weights the step that each sample was in; NaN if in none.

    A sample that was in two has a number that is not whole, in general.
    """
    last = steps_in(samples) - 1
    sizes = torch.full((samples,), GLOBAL_BATCH)
    sizes[last * GLOBAL_BATCH :] = samples - last * GLOBAL_BATCH
    moved = -weights[:samples, 0].double() * sizes / GLOBAL_BATCH
    steps: list[float] = (last - moved.log() / math.log1p(-DECAY)).tolist()
    return steps


def check(weights: Tensor, samples: int) -> float:
    """Return how far a step is from the one of its position at most."""
    if weights[samples:].any():
        raise SystemExit("a sample was trained that the stream does not have")
    steps = steps_of(weights, samples)
    errors = [abs(step - i // GLOBAL_BATCH) for i, step in enumerate(steps)]
    if not all(error < 0.25 for error in errors):
        wrong = next(i for i, error in enumerate(errors) if not error < 0.25)
        raise SystemExit(f"sample {wrong} was trained as in step {steps[wrong]}")
    return max(errors)


def train(samples: int, has_state: bool, run: Path, workers: int) -> list[str]:
    """Return the command that begins a training."""
    fields: dict[str, Any] = {
        "max_steps": steps_in(samples),
        "global_batch": GLOBAL_BATCH,
        "micro_batches": 6,
        "optimizer": {
            "name": "sgd",
            "lr": float(GLOBAL_BATCH),
            "weight_decay": DECAY / GLOBAL_BATCH,
        },
        "model.arguments.samples": samples,
        "data.arguments": {
            "samples": samples,
            "has_state": has_state,
            "progress": str(progress_of(run)),
        },
    }
    command = ["train", "--out", str(run), "--workers", str(workers)]
    for part in ("model:build", "data:load", "loss:loss"):
        option, function = part.split(":")
        command += [f"--{option}", f"streams:{function}"]
    for name, value in fields.items():
        command += ["--set", f"{name}={toml(value)}"]
    return command


def progress_of(run: Path) -> Path:
    return run.with_suffix(".progress")


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def spawn(command: list[str]) -> psutil.Popen:
    # Checkpoints that even a busy machine writes.
    often = ["--keep-checkpoints", "60", "--no-report"]
    return psutil.Popen(
        [sys.executable, "-m", "samestep", *command, *often],
        cwd=Path(__file__).parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: psutil.Popen) -> None:
    _, errors = process.communicate(timeout=DEADLINE)
    if process.returncode:
        raise SystemExit(f"a training failed: {errors}")


def newest(run: Path) -> int:
    """Return the step of the newest checkpoint, 0 if there is none."""
    return max(checkpoint.steps(checkpoint.directory_of(run)), default=0)


def is_finished(run: Path) -> bool:
    """Return whether a training had ended before it was killed."""
    file = run / "result.json"
    return file.exists() and json.loads(file.read_text())["status"] == "finished"


def kill_at(process: psutil.Popen, progress: Path, step: int) -> bool:
    """Kill a training when its stream was read up to this step.

    Returns whether it was still there.
    """
    end = time.monotonic() + DEADLINE
    while reached(progress) < step and process.poll() is None:
        if time.monotonic() > end:
            raise SystemExit(f"step {step} was not read within {DEADLINE:.0f} s")
        time.sleep(POLL_SECONDS)
    below = process.children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    psutil.wait_procs(below, timeout=cleanup.DEADLINE)
    return bool(process.returncode)


def reached(progress: Path) -> int:
    """Return the step up to which a stream was read."""
    text = progress.read_text() if progress.exists() else ""
    return int(text or 0)


def interrupted(arguments: argparse.Namespace, run: Path, has_state: bool) -> int:
    """Train with kills at random steps; return how many there were."""
    rng = random.Random(arguments.seed)  # noqa: S311
    steps, progress = steps_in(arguments.samples), progress_of(run)
    points = sorted(rng.sample(range(1, steps * 9 // 10), arguments.kills))
    command = train(arguments.samples, has_state, run, rng.randint(1, 3))
    kills, found = 0, set()
    for point in points:
        if is_finished(run):  # nothing is left to interrupt
            break
        progress.unlink(missing_ok=True)
        kills += kill_at(spawn(command), progress, point)
        workers, exchange = rng.randint(1, 3), rng.choice(["shared", "gloo"])
        found.add(newest(run))
        print(
            f"killed in step {point}, goes on from step {newest(run)} with {workers} "
            f"workers, {exchange}",
            flush=True,
        )
        command = ["resume", str(run), "--workers", str(workers)]
        command += ["--exchange", exchange]
    if not is_finished(run):
        finish(spawn(command))
    print(f"n = {kills} kills, {len(found)} different checkpoints", flush=True)
    return kills


def result(run: Path) -> tuple[str, Tensor]:
    """Return the fingerprint of a run and its weights."""
    found = json.loads((run / "result.json").read_text())
    weights = load_file(run / "model.safetensors")
    return found["weights_sha256"], next(iter(weights.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["state", "again"])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8_009)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("PYTHONPATH", os.pathsep.join(sys.path))
    for kind in arguments.kinds:
        has_state = kind == "state"
        with tempfile.TemporaryDirectory() as directory:
            alone, disturbed = Path(directory) / "alone", Path(directory) / "disturbed"
            finish(spawn(train(arguments.samples, has_state, alone, 1)))
            began = time.monotonic()
            kills = interrupted(arguments, disturbed, has_state)
            (expected, _), (found, weights) = result(alone), result(disturbed)
            error = check(weights, arguments.samples)
        if expected != found:
            raise SystemExit(f"other weights: {found}, alone {expected}")
        print(
            f"{kind}: n = {kills} kills in {time.monotonic() - began:.0f} s; all "
            f"{arguments.samples:,} samples once, in the step of their position "
            f"(within {error:.3f}), and one fingerprint, {found[:16]}",
            flush=True,
        )


if __name__ == "__main__":
    cleanup.run(main)
