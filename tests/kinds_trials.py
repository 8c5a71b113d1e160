"""How a kind of own code is tried: its trainings, and the judgement on them."""

import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from re import search
from typing import Any

import psutil
import torch
from kinds.table import KINDS, Kind

import samestep
from samestep import Run
from samestep.errors import SamestepError
from samestep.messages.training import Message, StepRecord
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.supervisor.forkserver_client import ForkServer


RECIPE = samestep.Recipe.from_dict(
    {
        "name": "own",
        "epochs": 2,
        "global_batch": 24,
        "micro_batches": 6,
        "model": {"family": "custom", "build": "kinds.plain:Net"},
        "data": {"source": "custom", "load": "kinds.plain:load"},
        "optimizer": {"name": "adam", "lr": 0.01},
    }
)
"""18 steps; the last of each epoch has half as many samples."""
MIDDLE = 13
"""A step in the second epoch."""
DEADLINE = 120.0

Kill = Callable[[], object]


class Listening(SilentView):
    """Keeps what a person is warned of; kills once a step is reached."""

    def __init__(self, kill: Kill | None) -> None:
        self.messages: list[str] = []
        self._kill = kill

    def note(self, text: str) -> None:
        """Keep a note if it is a warning."""
        if text.startswith("warning: "):
            self.messages.append(text)

    def receive(self, message: Message) -> None:
        """Kill workers once the step is reached; called between messages of rank 0."""
        is_late = isinstance(message, StepRecord) and message.step >= MIDDLE
        if self._kill and is_late:
            kill, self._kill = self._kill, None
            kill()


@dataclass
class Outcome:
    """How one training ended."""

    placement: str
    path: Path
    result: tuple[Any, ...] = ()
    """Fingerprint, losses; nothing if it was refused."""
    messages: str = ""
    """Warnings and the error."""

    def __str__(self) -> str:
        """Return a description for a failed test."""
        result = self.result[0][:12] if self.result else self.messages[-400:]
        return f"{self.placement}: {result}"


@dataclass
class Trial:
    """The trainings of one kind."""

    name: str
    directory: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def kind(self) -> Kind:
        """Return the entry of the table."""
        return KINDS[self.name]

    def train(
        self,
        server: ForkServer,
        workers: int,
        exchange: str = "shared",
        *,
        kill: Kill | None = None,
        how: str = "undisturbed",
        **placed: Any,
    ) -> Outcome:
        """Train from the beginning, with other owners at every step.

        `kill` is called once MIDDLE is reached.
        """
        out = self.directory / f"run-{next(self._numbers)}"
        view = Listening(kill)
        where = _placement(workers, exchange) | {"out": out, **placed}
        given = _parts(self.kind) | self.kind.fields
        title = f"{workers} over {exchange}, {where['balance']}, {how}"
        found = Outcome(title, out)
        try:
            run = samestep.train(RECIPE, **given, **where, view=view, server=server)
            found.result = _results(run)
        except SamestepError as error:
            view.messages.append(str(error))
        found.messages = "\n".join(view.messages)
        return found

    def resume(self, server: ForkServer, path: Path, how: str) -> Outcome:
        """Continue from the newest checkpoint of a run, with three workers."""
        view, found = Listening(None), Outcome(f"resumed by 3 over gloo, {how}", path)
        given = _parts(self.kind) | _placement(3, "gloo")
        try:
            run = samestep.resume(path, **given, view=view, server=server)
            found.result = _results(run)
        except SamestepError as error:
            view.messages.append(str(error))
        found.messages = "\n".join(view.messages)
        return found

    def resume_from_middle(self, server: ForkServer, whole: Outcome) -> Outcome:
        """Resume a finished run as if it had been killed before its last epoch.

        Where nothing was finished, three workers train from the beginning.
        """
        if not whole.result:
            return self.train(server, 3, "gloo")
        (whole.path / "result.json").unlink()
        (whole.path / "model.safetensors").unlink()
        directory = checkpoint.directory_of(whole.path)
        *_, last = checkpoint.steps(directory)
        shutil.rmtree(checkpoint.path_of(directory, last))
        return self.resume(server, whole.path, "from the middle")

    def lose_the_fork_server(
        self, server: ForkServer, workers: int, exchange: str
    ) -> Outcome:
        """Kill the fork server by a real SIGKILL; another one takes its place."""

        def kill() -> None:
            os.kill(server._process.pid, signal.SIGKILL)

        how = "fork server killed"
        return self.train(server, workers, exchange, kill=kill, how=how)

    def lose_everything(self, server: ForkServer) -> Outcome:
        """Kill a whole command, and continue with another one."""
        out = self.directory / "victim"
        code = f"import kinds_trials; kinds_trials.die({self.name!r}, {str(out)!r})"
        here = str(Path(__file__).parent)
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])},
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        if ended.returncode == -signal.SIGKILL:
            return self.resume(server, out / "run-0", "everything killed")
        return Outcome("2 over shared, refused before its end", out, (), ended.stderr)


def die(name: str, directory: str) -> None:
    """Train until the middle, then kill all processes of this training.

    In a process of its own. Prints what it was told if it gets no further than that.
    """
    Path(directory).mkdir()
    with ForkServer() as server:
        trial = Trial(name, Path(directory))
        found = trial.train(server, 2, kill=_kill_everything, checkpoint_seconds=0.0)
    print(found.messages, file=sys.stderr)


def _kill_everything() -> None:
    for process in psutil.Process().children(recursive=True):
        process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def judge(kind: Kind, outcomes: Sequence[Outcome]) -> None:
    """Assert that all end like the first, one undisturbed worker's, or say why not."""
    right, reason = outcomes[0].result, kind.reason
    messages = [each for each in outcomes if reason and search(reason, each.messages)]
    calm = [each for each in outcomes if each.result and each.result == right]
    silent = [
        str(each) for each in outcomes if each not in messages and each not in calm
    ]
    assert not silent, "\n".join([str(outcomes[0]), *silent])
    assert bool(messages) == bool(reason), f"Nobody was told of `{reason}`."


def _placement(workers: int, exchange: str) -> dict[str, Any]:
    return {
        "workers": workers,
        "exchange": exchange,
        "balance": "random",
        "snapshot_seconds": 1e-9,  # after each step
        "prefetch": "off",  # these samples are always slower than so small a model
    }


def _parts(kind: Kind) -> dict[str, Any]:
    """Return the model, the data and the loss, for `train` and `resume`."""
    named = {"model": kind.model, "data": kind.data, "loss": kind.loss}
    found: dict[str, Any] = {p: f"kinds.{name}" for p, name in named.items() if name}
    if kind.is_given:
        module, _, function = found["model"].partition(":")
        torch.manual_seed(0)  # the same weights in every call
        found["model"] = getattr(importlib.import_module(module), function)()
    return found


def _results(run: Run) -> tuple[Any, ...]:
    """Return what must be equal at any placement."""
    epochs = [
        (each["weights_sha256"], each["train_loss"], each.get("validation_loss"))
        for each in run.history
    ]
    return run.weights_sha256, run.result["test_loss"], *epochs
