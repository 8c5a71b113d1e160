"""Trainings of one recipe that must end with the same bits, on one GPU."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import samestep
from gpu.report import Report
from gpu.sizes import Sizes
from samestep.errors import WorkerFailed
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system.fault_injection import SCHEDULE, Fault


RECIPES = ("mnist-mlp", "mnist-cnn", "mnist-rnn", "mnist-vit", "chars-transformer")


@dataclass
class Trials:
    """Trainings of one recipe in new directories."""

    recipe: samestep.Recipe
    device: str
    server: ForkServer
    out: Path

    def train(self, workers: int = 1, **more: Any) -> samestep.Run:
        """Train; workers exchange over Gloo, so that they may share a GPU."""
        where: dict[str, Any] = {"device": self.device, "workers": workers}
        where |= {"exchange": "gloo", "snapshot_seconds": 0.01} | more
        out = more.get("out", Path(tempfile.mkdtemp(dir=self.out)) / "run")
        options: dict[str, Any] = {"view": SilentView(), "server": self.server}
        return samestep.train(self.recipe, **options, **where | {"out": out})

    def killed(self, workers: int = 1) -> samestep.Run:
        """Train; the last worker is killed in the middle, and replaced."""
        with self.killing(workers - 1):
            run = self.train(workers)
        if run.result["restarts"] != 1:
            raise RuntimeError(f"{run.result['restarts']} restarts after one SIGKILL")
        return run

    def resumed(self) -> samestep.Run:
        """Train until a SIGKILL that ends the training, then resume."""
        out = self.out / "resumed"
        with self.killing(0), suppress(WorkerFailed):
            self.train(out=out, max_restarts=0)
            raise RuntimeError("the training has survived the SIGKILL")
        options: dict[str, Any] = {"view": SilentView(), "server": self.server}
        return samestep.resume(out, device=self.device, workers=1, **options)

    @contextmanager
    def killing(self, rank: int) -> Iterator[None]:
        """Let a worker of the next training kill itself before a forward pass."""
        step = (self.recipe.max_steps or 0) // 2
        fault = Fault(number=1, kind="kill", point="forward", step=step, rank=rank)
        file = self.out / "faults.json"
        file.write_text(json.dumps([asdict(fault)]))
        os.environ[SCHEDULE] = str(file)
        try:
            yield
        finally:
            del os.environ[SCHEDULE]


def exact(name: str, sizes: Sizes, report: Report) -> None:
    """Train a recipe again and again, and compare the fingerprints."""
    with ForkServer() as server, tempfile.TemporaryDirectory() as out:
        trials = Trials(sizes.short(name), sizes.device, server, Path(out))
        first = trials.train()
        report.figures |= {"n": 1, "steps": sizes.steps}
        report.figures["weights_sha256"] = first.weights_sha256
        again: dict[str, Callable[[], samestep.Run]] = {
            "trained again": trials.train,
            "over the exchange of `auto`": lambda: trials.train(exchange="auto"),
            "2 workers on one device": lambda: trials.train(2),
            "3 workers on one device": lambda: trials.train(3),
            "killed": trials.killed,
            "killed, of 2 workers": lambda: trials.killed(2),
            "resumed": trials.resumed,
        }
        for what, train in again.items():
            report.check(what, partial(same, first, train))
            report.figures["n"] += 1
        for workers in (1, 2):
            what = f"evaluated by {workers}"
            report.check(what, partial(evaluated, first, trials, workers))


def same(first: samestep.Run, train: Callable[[], samestep.Run]) -> str:
    """Train; return `identical`, or raise."""
    other = train()
    if other.weights_sha256 != first.weights_sha256:
        raise RuntimeError(f"other weights: {other.weights_sha256}")
    return "identical"


def evaluated(run: samestep.Run, trials: Trials, workers: int) -> str:
    """Evaluate the run's weights; return `identical`, or raise."""
    found = samestep.evaluate(
        run,
        server=trials.server,
        device=trials.device,
        workers=workers,
        exchange="gloo",
    )
    expected = run.result["test_loss"], run.result["test_accuracy"]
    if (found.loss, found.accuracy) != expected:
        raise RuntimeError(f"{found.loss, found.accuracy} instead of {expected}")
    return "identical"
