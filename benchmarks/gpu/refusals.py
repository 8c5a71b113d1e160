"""What is refused on a GPU, and whether its memory is given back."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import samestep
from gpu.exact import Trials
from gpu.report import Report, Skipped
from gpu.sizes import Sizes
from samestep.errors import SamestepError
from samestep.output.console import SilentView
from samestep.supervisor.forkserver_client import ForkServer


MARGIN = 32 << 20
"""Bytes of a GPU's memory that may come and go with its other users."""


@dataclass(frozen=True)
class Refusal:
    """What is refused, and a part of the message."""

    what: str
    message: str
    attempt: Callable[[], object]
    needs_gpu: bool = True

    def check(self, has_gpu: bool) -> str:
        """Return the message; raise if there is none, or another."""
        if self.needs_gpu and not has_gpu:
            raise Skipped("needs a GPU")
        try:
            self.attempt()
        except SamestepError as error:
            if not re.search(self.message, str(error)):
                raise
            return f"refused: {error}"
        raise RuntimeError("it was not refused")


def refusals(sizes: Sizes, report: Report) -> None:
    """Ask for what is refused, and compare the messages."""
    with ForkServer() as server, tempfile.TemporaryDirectory() as out:
        gpus = len(server.gpus().names)
        listed = [*refused_trainings(sizes, server, Path(out), gpus)]
        listed.append(refused_resumption(sizes, server, Path(out)))
        for refusal in listed:
            report.check(refusal.what, partial(refusal.check, gpus > 0))
        report.figures["n"] = len(listed)


def refused_trainings(
    sizes: Sizes, server: ForkServer, out: Path, gpus: int
) -> Iterator[Refusal]:
    """Yield the trainings that are refused, on the CPU and on GPUs."""
    recipe = sizes.short("mnist-mlp")

    def train(**fields: Any) -> object:
        fields |= {"out": Path(tempfile.mkdtemp(dir=out)) / "run", "server": server}
        return samestep.train(recipe, view=SilentView(), **fields)

    yield Refusal(
        "NCCL on the CPU", "is for GPUs", lambda: train(exchange="nccl"), False
    )
    if gpus == 0:
        yield Refusal(
            "a GPU where there is none",
            "needs a GPU that PyTorch can use",
            lambda: train(device="cuda"),
            needs_gpu=False,
        )
    yield Refusal(
        "portable arithmetic on a GPU",
        "computes on the CPU so far, not on `cuda`",
        lambda: train(device="cuda", arithmetic="portable"),
    )
    yield Refusal(
        "shared memory between GPUs",
        "received `--exchange shared`. Leave it out",
        lambda: train(device="cuda", exchange="shared"),
    )
    many = {"workers": gpus + 1, "micro_batches": gpus + 1}
    yield Refusal(
        "more workers than GPUs over NCCL",
        "each worker needs one of its own",
        lambda: train(device="cuda", exchange="nccl", **many),
    )


def refused_resumption(sizes: Sizes, server: ForkServer, out: Path) -> Refusal:
    """Train on the CPU; return the refusal of going on elsewhere."""
    recipe = sizes.short("mnist-mlp").changed({"schedule": {"name": "constant"}})
    options: dict[str, Any] = {"server": server, "view": SilentView(), "workers": 1}
    run = samestep.train(recipe, out=out / "on-cpu", **options)
    more = sizes.steps + 1
    return Refusal(
        "a run of the CPU, resumed on a GPU",
        "device: cpu then, cuda",
        lambda: samestep.resume(run, device="cuda", max_steps=more, **options),
    )


def memory(sizes: Sizes, report: Report) -> None:
    """Compare the GPU's free memory before and after trainings, one of them killed."""
    before = free_bytes()
    with ForkServer() as server, tempfile.TemporaryDirectory() as out:
        trials = Trials(sizes.short("mnist-cnn"), sizes.device, server, Path(out))
        trials.killed(2)
        after = free_bytes()
    report.figures |= {"free_bytes_before": before, "free_bytes_after": after, "n": 1}
    if before - after > MARGIN:
        raise RuntimeError(f"{(before - after) >> 20} MiB are still taken")


def free_bytes() -> int:
    """Return the free memory of the GPU, as a new process sees it."""
    code = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.check_output([sys.executable, "-c", code], timeout=60))
