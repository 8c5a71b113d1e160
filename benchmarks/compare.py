r"""samestep and its peers, side by side in one run: A B C A B C ...

    python benchmarks/compare.py mnist-mlp-classic
    python benchmarks/compare.py mnist-mlp-classic --set global_batch=512
    python benchmarks/compare.py mnist-mlp-classic loop-2 ddp-2

Every round runs every contender once, in a fresh process, for EPOCHS epochs. An epoch's
time leaves out start-up and evaluation; the first epoch of each process is a warm-up
and is left out too. The ratio is taken within a round, to the first contender, so that
the drift of the machine's speed cancels. Nothing else should run on the machine.

"rest" is what a whole process takes besides its epochs: start-up, compilation, the
evaluation. "memory" is the largest sum of the proportional set sizes (each shared page
counted once) of a contender's processes, sampled every two seconds.

Everybody is kept to AVX2 by

    SAMESTEP_ISA=v3 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        ONEDNN_MAX_CPU_ISA=AVX2 XLA_FLAGS=--xla_cpu_max_isa=AVX2 \
        python benchmarks/compare.py mnist-mlp-classic

A peer's network must have the shapes of samestep's. Peers have Adam and AdamW, and none
of a recipe's fields beyond the usual; other recipes are refused.

The peers need `pip install --constraint constraints.txt '.[benchmarks]'`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import cleanup
import psutil
from rich.console import Console
from rich.table import Table

from samestep import Recipe, Run, models
from samestep.config.recipe import parse_override
from samestep.data import dataset
from samestep.system import machine


HERE = Path(__file__).parent
PYTHON = sys.executable
Command = Callable[[Path, int, Path], list[str]]


@dataclass(frozen=True)
class Measurement:
    """One process: seconds of its epochs after the first, and of all of it."""

    epoch_seconds: float
    rest_seconds: float
    wall_seconds: float
    peak_megabytes: float
    test_accuracy: float


def peer(script: str, threads: int, *launcher: str) -> Command:
    """Return the command of a script in `peers`, with Python or a launcher."""

    def command(recipe: Path, epochs: int, _: Path) -> list[str]:
        path = str(HERE / "peers" / f"{script}.py")
        start = [PYTHON, *(("-m", *launcher) if launcher else ())]
        return [*start, path, str(recipe), str(epochs), str(threads)]

    return command


def samestep(workers: int, *options: str) -> Command:
    """Return the command line that a user would type."""

    def command(recipe: Path, epochs: int, out: Path) -> list[str]:
        train = [
            PYTHON,
            "-m",
            "samestep",
            "train",
            str(recipe),
            "--epochs",
            str(epochs),
        ]
        return [*train, "--workers", str(workers), "--out", str(out), *options]

    return command


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
CONTENDERS = {
    "samestep-2": samestep(2),
    "samestep-1": samestep(1),
    "samestep-2-torch": samestep(2, "--set", "arithmetic=torch"),
    "samestep-2-gloo": samestep(2, "--exchange", "gloo"),
    "plain-1": peer("plain", 1),
    "plain-2": peer("plain", 2),
    "ddp-2": peer("ddp", 1, *TORCHRUN),
    "loop-2": peer("looped", 1, *TORCHRUN),
    "accelerate-2": peer("accelerated", 1, *TORCHRUN),
    "lightning-2": peer("lit", 1),
    "jax-2": peer("jaxed", 2),
    # As many micro-batches as workers: nothing is cut finer than by the peers.
    "samestep-1-whole": samestep(1, "--micro-batches", "1"),
    "samestep-2-halves": samestep(2, "--micro-batches", "2", "--exchange", "gloo"),
}
EXTRA = (
    *("samestep-2-torch", "samestep-2-gloo", "loop-2"),
    *("samestep-1-whole", "samestep-2-halves"),
)
DEFAULT = [name for name in CONTENDERS if name not in EXTRA]


Shapes = list[list[int]]
PEERS_READ = {
    *("name", "seed", "epochs", "global_batch", "micro_batches", "evaluation_batch"),
    *("threads", "data", "model", "loss", "optimizer", "schedule", "precision"),
    "arithmetic",
}
"""Fields of a recipe that the peers know, or that change nothing for them."""
OPTIMIZER_READ = {"name", "lr", "betas", "eps", "weight_decay", "max_grad_norm"}


def default(recipe: Recipe) -> list[str]:
    """The contenders that can train it; networks in JAX are written for some alone."""
    family, norm = recipe.model.family, getattr(recipe.model, "norm", "none")
    if family in ("mlp", "cnn", "transformer") and norm == "none":
        return DEFAULT
    print(f"jax-2 is left out: it has no network for `{family}`", file=sys.stderr)
    return [name for name in DEFAULT if name != "jax-2"]


def unread(recipe: Recipe) -> list[str]:
    """Return what the peers would leave out of a training of this recipe."""
    fields = recipe.to_dict()
    found = sorted(fields.keys() - PEERS_READ)
    found += [f"optimizer.{n}" for n in fields["optimizer"].keys() - OPTIMIZER_READ]
    if "augment" in fields["data"]:
        found.append("data.augment")
    if recipe.precision != "float32":
        found.append("precision")
    if recipe.optimizer.name not in ("adam", "adamw"):
        found.append("optimizer.name")
    return found


def shapes(recipe: Recipe) -> Shapes:
    """Return those of the parameters of samestep's network, sorted."""
    model = models.build(recipe.model, dataset.load(recipe.data))
    return sorted(list(parameter.shape) for parameter in model.parameters())


def check_network(name: str, expected: Shapes, found: Shapes) -> None:
    """Raise SystemExit if a peer trains another network than samestep."""
    if found != expected:
        raise SystemExit(
            f"Contenders train networks with parameters of the same shapes: those of "
            f"samestep are {expected}, those of {name} {found}."
        )


def measure(name: str, recipe: Path, epochs: int, expected: Shapes) -> Measurement:
    """Run one contender once; its parameters must have the `expected` shapes."""
    with tempfile.TemporaryDirectory() as directory:
        out, printed = Path(directory) / "run", Path(directory) / "printed"
        env = {**os.environ, "OMP_NUM_THREADS": "2" if name == "plain-2" else "1"}
        start = time.perf_counter()
        with printed.open("w") as output, (Path(directory) / "err").open("w") as errors:
            process = subprocess.Popen(
                CONTENDERS[name](recipe, epochs, out),
                stdout=output,
                stderr=errors,
                env=env,
            )
            peak = _watch(process)
        wall = time.perf_counter() - start
        if process.returncode:
            text = (Path(directory) / "err").read_text()
            raise SystemExit(f"{name} failed:\n{text}")
        if name.startswith("samestep"):
            result = Run.open(out).result
            seconds = [epoch["seconds"] for epoch in result["epochs"]]
            accuracy = result["test_accuracy"]
        else:
            lines = printed.read_text().splitlines()
            record = json.loads(next(line for line in lines if line[:2] == '{"'))
            check_network(name, expected, record["shapes"])
            seconds, accuracy = record["epoch_seconds"], record["test_accuracy"]
    rest = wall - sum(seconds)
    return Measurement(statistics.median(seconds[1:]), rest, wall, peak, accuracy)


def _watch(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end; return the peak memory of all processes in megabytes."""
    peak = 0.0
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)  # more often would take time from the contender
            return peak
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            peak = max(peak, sum(_proportional_megabytes(p) for p in family))


def _proportional_megabytes(process: psutil.Process) -> float:
    """Read smaps_rollup once; psutil's own way reads every mapping."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if "Pss:" in line), 0.0)


def summarise(rounds: list[dict[str, Measurement]]) -> list[dict[str, float | str]]:
    """Return median and range over the rounds, and ratios to the first contender."""
    rows: list[dict[str, float | str]] = []
    names = list(rounds[0])
    for name in names:
        seconds = [r[name].epoch_seconds for r in rounds]
        ratios = [r[name].epoch_seconds / r[names[0]].epoch_seconds for r in rounds]
        rows.append(
            {
                "contender": name,
                "epoch_seconds": statistics.median(seconds),
                "epoch_seconds_min": min(seconds),
                "epoch_seconds_max": max(seconds),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                **{
                    field: statistics.median([getattr(r[name], field) for r in rounds])
                    for field in (
                        "rest_seconds",
                        "wall_seconds",
                        "peak_megabytes",
                        "test_accuracy",
                    )
                },
            }
        )
    return rows


def show(rows: list[dict[str, float | str]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    heads = ("epoch s", "min-max", "ratio", "min-max", "rest s", "memory MB", "test")
    table.add_column("contender")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            str(row["contender"]),
            f"{row['epoch_seconds']:.2f}",
            f"{row['epoch_seconds_min']:.2f}-{row['epoch_seconds_max']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}",
            f"{row['rest_seconds']:.1f}",
            f"{row['peak_megabytes']:.0f}",
            f"{row['test_accuracy']:.2%}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument(
        "contenders", nargs="*", metavar="CONTENDER", help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--save", type=Path, help="all measurements, as JSON")
    arguments = parser.parse_args()
    recipe = Recipe.load(arguments.recipe, dict(map(parse_override, arguments.set)))
    names = arguments.contenders or default(recipe)
    if wrong := set(names) - CONTENDERS.keys():
        parser.error(f"contenders are {', '.join(CONTENDERS)}; received {wrong}")
    if arguments.epochs < 2:
        parser.error("--epochs is at least 2, since the first one is left out")
    if any(not name.startswith("samestep") for name in names) and unread(recipe):
        parser.error(f"peers cannot train with {', '.join(unread(recipe))}")
    expected, rounds = shapes(recipe), []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recipe.toml"
        path.write_text(recipe.to_toml())
        for index in range(arguments.rounds):
            rounds.append(
                {n: measure(n, path, arguments.epochs, expected) for n in names}
            )
            print(f"round {index + 1}/{arguments.rounds}", file=sys.stderr, flush=True)
    rows = summarise(rounds)
    title = f"{recipe.name}, global batch {recipe.global_batch}, n = {len(rounds)}"
    show(rows, title)
    if arguments.save:
        raw = [{name: asdict(m) for name, m in r.items()} for r in rounds]
        record = {"machine": machine.describe(), "rows": rows, "rounds": raw}
        arguments.save.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    cleanup.run(main)
