"""Modules of other libraries: exact at 1, 2 and 3 workers, or refused, and why?

    make zoo
    python benchmarks/zoo/run.py hf_gpt2 vit

Prints a table. Through `samestep.train`: over both exchanges, with other owners at
every step, and once with a worker that is killed.
"""

import argparse
import os
import signal
import tempfile
import warnings
from pathlib import Path

from table import ZOO, Entry

import samestep
from samestep.errors import SamestepError
from samestep.messages.training import Message, StepRecord, WorkersStarted
from samestep.output.console import SilentView
from samestep.supervisor import launch
from samestep.supervisor.forkserver_client import ForkServer


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


def trained(entry: Entry, server: ForkServer, out: Path) -> str:
    """Return, for all placements, `exact` or what was said."""
    parts = {"model": entry.build, "data": f"modules:{entry.data}", "loss": entry.loss}
    given: dict[str, object] = {part: name for part, name in parts.items() if name}
    if not entry.loss and entry.data in ("values", "itself"):
        given["loss"] = "squared-error"
    if entry.data == "pixels":
        given["data__outputs"] = 2

    def train(workers: int, exchange: str, view: SilentView) -> str:
        where = {"workers": workers, "exchange": exchange, "balance": "random"}
        rest = {"out": out / f"{workers}-{exchange}-{type(view).__name__}"}
        rest |= {"view": view, "server": server, "prefetch": "off"}
        rest |= {"snapshot_seconds": 1e-9}
        try:
            run = samestep.train(**given, **RECIPE, **where, **rest)
        except SamestepError as error:
            return f"refused: {error}"
        return run.weights_sha256

    ends = [train(*where, SilentView()) for where in PLACEMENTS]
    return verdict([*ends, train(2, "shared", Killing())])


def verdict(ends: list[str]) -> str:
    """Judge the fingerprints and refusals, one for each placement."""
    refusals = [end for end in ends if end.startswith("refused")]
    if refusals:
        always = len(refusals) == len(ends)
        which = "" if always else f"at {len(refusals)} of {len(ends)} placements "
        return which + refusals[0]
    return "exact" if len(set(ends)) == 1 else f"DIFFERENT: {[e[:8] for e in ends]}"


def main() -> None:
    """Write rows as they are found."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MODULE", help="; ".join(ZOO))
    arguments = parser.parse_args()
    names = arguments.names or list(ZOO)
    for preloaded in launch.PRELOAD.values():
        preloaded.extend(LIBRARIES)
    print("| library | module | `train` |")
    print("| --- | --- | --- |", flush=True)
    with ForkServer() as server, tempfile.TemporaryDirectory() as runs:
        for name in names:
            cells = [ZOO[name].library, f"`{name}`"]
            cells.append(trained(ZOO[name], server, Path(runs) / name))
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
