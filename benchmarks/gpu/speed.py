"""Seconds per epoch: samestep beside plain loops of PyTorch, on the same device.

A plain loop has its samples on the device, and takes no snapshots. Every kind of loop
is a part, so a process of its own: what is compiled, captured or deterministic is so
from the beginning.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import Task, in_memory
from torch import Tensor, nn

import samestep
from gpu.report import Report
from gpu.sizes import Sizes
from samestep.data import dataset
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


RECIPES = ("mnist-mlp", "mnist-cnn")
Step = Callable[[Tensor], Tensor]
"""Take a step on the samples of these numbers; return the loss."""


class Loop:
    """A plain loop over a recipe's samples, which lie on the device."""

    def __init__(self, recipe: samestep.Recipe, device: str) -> None:
        data = dataset.load(recipe.data)
        train = in_memory(recipe, data.splits["train"])
        task = Task(recipe, recipe.epochs or 0, 1, data, train, train)
        self.inputs, self.targets = (part.to(device) for part in train)
        self.batch, self.device = recipe.global_batch, device
        self.model: nn.Module = task.model().to(device)
        self.optimizer, self._criterion = task.optimizer(self.model), task.criterion()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of a batch."""
        loss: Tensor = self._criterion(self.model(inputs), targets)
        return loss

    def step(self, samples: Tensor) -> Tensor:
        """Take a step on the samples of these numbers; return the loss."""
        self.optimizer.zero_grad()
        loss = self.loss(self.inputs[samples], self.targets[samples])
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def epochs(self, number: int, step: Step) -> Iterator[float]:
        """Yield the seconds of each epoch but the first."""
        for epoch in range(number):
            start = time.perf_counter()
            total = torch.zeros((), device=self.device)
            order = torch.randperm(len(self.targets), device=self.device)
            for samples in torch.split(order, self.batch):
                total += step(samples)
            if not torch.isfinite(total).item():  # which waits for the GPU
                raise RuntimeError(f"the loss of epoch {epoch} is {total.item()}")
            if epoch:
                yield time.perf_counter() - start


def eager(loop: Loop) -> Step:
    """Return the step as it is."""
    return loop.step


def compiled(loop: Loop) -> Step:
    """Return the step with compiled passes; those of a smaller batch are not.

    A dry run compiles no code, which would take most of its time.
    """
    torch._dynamo.reset()
    backend = "inductor" if loop.device == "cuda" else "aot_eager"
    plain, fast = loop.loss, torch.compile(loop.loss, dynamic=False, backend=backend)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return (fast if len(inputs) == loop.batch else plain)(inputs, targets)

    loop.loss = loss  # type: ignore[method-assign]
    return loop.step


def captured(loop: Loop) -> Step:
    """Return the whole step as a CUDA graph; a smaller batch is taken without it."""
    for group in loop.optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = torch.tensor(group["lr"], device=loop.device)
    places = torch.arange(loop.batch, device=loop.device)
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries prepare themselves, which a graph must not do
            loop.step(places)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loop.step(places)

    def step(samples: Tensor) -> Tensor:
        if len(samples) < loop.batch:
            return loop.step(samples)
        places.copy_(samples)
        graph.replay()
        return loss

    return step


def plain(
    kind: Callable[[Loop], Step], sizes: Sizes, report: Report, how: str = ""
) -> None:
    """Time the epochs of one kind of plain loop."""
    # float32 means float32, as for samestep: TF32 keeps 10 bits of the mantissa.
    torch.backends.cudnn.allow_tf32 = False
    for name in RECIPES:
        for batch in sizes.batches:
            recipe = sizes.timed(name, batch)
            loop = Loop(recipe, sizes.device)
            seconds = [*loop.epochs(sizes.epochs, kind(loop))]
            note(report, f"{name}, batch {batch}{how}", seconds)


def deterministic(sizes: Sizes, report: Report) -> None:
    """Time the eager loop with what samestep's workers set on a GPU.

    Besides, without filling memory before it is written, which torch does as well.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    plain(eager, sizes, report)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    plain(eager, sizes, report, ", memory not filled")


def ours(sizes: Sizes, report: Report) -> None:
    """Time samestep's epochs, with one micro-batch and with four."""
    with ForkServer() as server, tempfile.TemporaryDirectory() as out:
        for name in RECIPES:
            for batch in sizes.batches:
                for pieces in (1, 4):
                    recipe = sizes.timed(name, batch, pieces)
                    history = trained(recipe, sizes, server, Path(out)).history
                    what = f"{name}, batch {batch}, micro-batches {pieces}"
                    note(report, what, [epoch["seconds"] for epoch in history[1:]])


def profile(sizes: Sizes, report: Report) -> None:
    """Say where the time of a step goes, as `--profile` does."""
    with ForkServer() as server, tempfile.TemporaryDirectory() as out:
        for batch in sizes.batches:
            fields = {"epochs": None, "max_steps": sizes.profiled + 20}
            recipe = sizes.timed("mnist-mlp", batch, 4).changed(fields)
            run = trained(recipe, sizes, server, Path(out), profile=sizes.profiled)
            content = json.loads((run.path / "trace.json").read_text())
            spans = [e for e in content["traceEvents"] if e["ph"] == "X"]
            sums: dict[str, float] = {}
            for span in spans:
                sums[span["name"]] = sums.get(span["name"], 0.0) + span["dur"]
            n = len({span["args"]["step"] for span in spans})
            means = {phase: round(us / n, 1) for phase, us in sums.items()}
            report.figures[f"batch {batch}"] = {"microseconds": means, "n": n}


def trained(
    recipe: samestep.Recipe, sizes: Sizes, server: ForkServer, out: Path, **more: Any
) -> samestep.Run:
    """Train on one device with one worker."""
    directory = Path(tempfile.mkdtemp(dir=out)) / "run"
    options: dict[str, Any] = {"server": server, "view": SilentView()} | more
    options |= {"device": sizes.device, "workers": 1, "out": directory}
    return samestep.train(recipe, **options)


def note(report: Report, what: str, seconds: list[float]) -> None:
    """Keep the median and the range of an epoch's seconds."""
    middle, n = statistics.median(seconds), len(seconds)
    figures = {"median": middle, "least": min(seconds), "most": max(seconds), "n": n}
    report.figures[what] = figures
    print(f"{what}: {middle:.4f} s (n={n})", flush=True)
    report.save(None)
