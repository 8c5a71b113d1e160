"""Modules of other libraries: exact at 1, 2 and 3 workers, or refused, and why?

    make zoo
    python benchmarks/zoo/run.py hf_gpt2 vit
    python benchmarks/zoo/run.py --arithmetic portable

Prints a table. Through `samestep.train`: over both exchanges, with other owners at
every step, and once with a worker that is killed. With portable arithmetic also with
each instruction set of this processor, and beside gradients in float64.
"""

import argparse
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gradients
from table import ZOO, Entry

import samestep
from samestep.errors import SamestepError
from samestep.kernels.library import VARIABLE, supported_isas
from samestep.messages.training import Message, StepRecord, WorkersStarted
from samestep.output.console import SilentView
from samestep.supervisor import launch
from samestep.supervisor.forkserver_client import ForkServer
from samestep.user_code.arguments import recipe_of, split_fields


LIBRARIES = [
    *("transformers", "peft", "x_transformers", "vit_pytorch", "timm"),
    *("monai.networks.nets", "segmentation_models_pytorch", "torch_geometric.nn"),
    *("vector_quantize_pytorch", "kornia.augmentation", "torch._dynamo"),
]
"""Imported once, by the process that forks all workers."""
PLACEMENTS = [(1, "shared"), (2, "gloo"), (3, "shared"), (3, "gloo")]
KILLED_AT = 4
RECIPE = {"epochs": 2, "global_batch": 18, "micro_batches": 5, "lr": 0.01}
"""Three steps an epoch; the last has 12 samples."""


class Killing(SilentView):
    """Kills the last worker once a step is reached."""

    def __init__(self) -> None:
        self._pids: list[int] = []

    def receive(self, message: Message) -> None:
        """Kill the last worker once the step is reached."""
        if isinstance(message, WorkersStarted):
            self._pids = [*self._pids, *message.pids]
        is_late = isinstance(message, StepRecord) and message.step >= KILLED_AT
        if is_late and self._pids:
            os.kill(self._pids[-1], signal.SIGKILL)
            self._pids = []


def recipe_fields(entry: Entry, arithmetic: str) -> dict[str, object]:
    """Return what a training of the module is given."""
    parts = {"model": entry.build, "data": f"modules:{entry.data}", "loss": entry.loss}
    given: dict[str, object] = {part: name for part, name in parts.items() if name}
    if not entry.loss and entry.data in ("values", "itself"):
        given["loss"] = "squared-error"
    if entry.data == "pixels":
        given["data__outputs"] = 2
    return {**given, **RECIPE, "arithmetic": arithmetic}


def trained(
    given: dict[str, object], server: ForkServer, others: list[ForkServer], out: Path
) -> str:
    """Return, for all placements, `exact` or what was said.

    `others` have other instruction sets.
    """

    def train(
        workers: int, exchange: str, view: SilentView, server: ForkServer = server
    ) -> str:
        where = {"workers": workers, "exchange": exchange, "balance": "random"}
        rest = {"out": Path(tempfile.mkdtemp(dir=out)) / "run"}
        rest |= {"view": view, "server": server, "prefetch": "off"}
        rest |= {"snapshot_seconds": 1e-9}
        try:
            run = samestep.train(**given, **where, **rest)
        except SamestepError as error:
            return f"refused: {error}"
        return run.weights_sha256

    ends = [train(*PLACEMENTS[0], SilentView())]
    if given["arithmetic"] == "portable" and ends[0].startswith("refused"):
        return ends[0]  # by what the module computes, wherever that is
    ends += [train(*where, SilentView()) for where in PLACEMENTS[1:]]
    ends.append(train(2, "shared", Killing()))
    ends += [train(2, "shared", SilentView(), other) for other in others]
    return verdict(ends)


def verdict(ends: list[str]) -> str:
    """Judge the fingerprints and refusals, one for each placement."""
    refusals = [end for end in ends if end.startswith("refused")]
    if refusals:
        always = len(refusals) == len(ends)
        which = "" if always else f"at {len(refusals)} of {len(ends)} placements "
        return which + refusals[0]
    return (
        f"exact {ends[0][:8]}"
        if len(set(ends)) == 1
        else f"DIFFERENT: {[e[:8] for e in ends]}"
    )


def compared(given: dict[str, object]) -> str:
    """Return the largest errors of gradients: the program's, and PyTorch's."""
    parts = {
        part: str(given[part]) for part in ("model", "data", "loss") if part in given
    }
    fields, _ = split_fields({k: v for k, v in given.items() if k not in parts})
    ours, torchs = gradients.errors(recipe_of(None, parts, fields))
    return f"{ours:.1e} | {torchs:.1e}"


@contextmanager
def servers(arithmetic: str) -> Iterator[tuple[ForkServer, list[ForkServer]]]:
    """Start a fork server for trainings, and one for each other instruction set."""
    *others, _ = supported_isas() if arithmetic == "portable" else [""]
    with ExitStack() as stack:
        server, started = stack.enter_context(ForkServer()), []
        for isa in others:
            os.environ[VARIABLE] = isa
            started.append(stack.enter_context(ForkServer()))
        os.environ.pop(VARIABLE, None)
        yield server, started


def main() -> None:
    """Write rows as they are found."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODULE", help="; ".join(ZOO))
    parser.add_argument("--arithmetic", choices=("torch", "portable"), default="torch")
    arguments = parser.parse_args()
    for preloaded in launch.PRELOAD.values():
        preloaded.extend(LIBRARIES)
    is_portable = arguments.arithmetic == "portable"
    titles = ["library", "module", "`train`"]
    titles += ["gradients: error", "PyTorch's"] if is_portable else []
    print(f"| {' | '.join(titles)} |")
    print("| --- " * len(titles) + "|", flush=True)
    with servers(arguments.arithmetic) as (server, others):
        for name in arguments.names or ZOO:
            given = recipe_fields(ZOO[name], arguments.arithmetic)
            with tempfile.TemporaryDirectory() as out:
                cells = [ZOO[name].library, f"`{name}`"]
                cells.append(trained(given, server, others, Path(out)))
            if is_portable:
                is_exact = cells[-1].startswith("exact")
                cells.append(compared(given) if is_exact else " | ")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
