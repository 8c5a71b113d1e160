"""Plants faults in trainings and forged runs, and counts what audits find.

    python benchmarks/faults.py
    python benchmarks/faults.py --faults 16 --trainings 2

Each fault is alone in a run. Of the eight kinds, five are in a worker: one bit of a
gradient, a parameter, an optimizer's state or a sample, or a micro-batch whose gradient
is left out; its run goes on from there as if nothing were wrong. Three are forged: a
run that was resumed with another learning rate, which every file denies; a wrong hash
in the ledger; a checkpoint of another training. The forger closes all chains, digests
and checksums again. Trainings are small, of five recipes, at 1 to 3 workers, and are
audited at others.

A fault that changes no bit, or ends the training, is counted and drawn again. The
expected step is the first that the fault changes in the ledger, as a correct training
shows; without any, the next checkpoint. Random audits are compared with the probability
of choosing a false segment. Ends with exit code 1 if a fault is not found at its step,
or if an audit of a correct run finds one.
"""

import argparse
import inspect
import math
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cleanup
import numpy as np
from forging import (
    kept,
    load,
    records,
    rewrite_checkpoint,
    rewrite_ledger,
    rewrite_model,
)
from planting import PLANTED, Fault

import samestep
from samestep import Audit, Recipe, Run
from samestep.errors import TrainingError
from samestep.output import ledger
from samestep.output.console import SilentView
from samestep.state import checkpoint
from samestep.state.hashing import hash_of
from samestep.supervisor import checkpoint_writer
from samestep.supervisor.forkserver_client import ForkServer


INSIDE = ("gradient", "parameter", "state", "sample", "skip")
NAMES = {
    "gradient": "a bit of a gradient",
    "parameter": "a bit of a parameter",
    "state": "a bit of an optimizer's state",
    "sample": "a bit of a sample",
    "skip": "a micro-batch skipped",
    "lr": "resumed with another learning rate",
    "ledger": "a hash in the ledger",
    "checkpoint": "a checkpoint of another training",
}
CHECKPOINTS = 5
MNIST: dict[str, Any] = {"global_batch": 96, "micro_batches": 6}
MNIST |= {"data.train_samples": 1000, "data.validation": 500}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
TORCH = {"arithmetic": "torch", "model.dropout": 0.2, "model.norm": "batch"}
MLP: dict[str, Any] = MNIST | {"model.hidden": [37, 19], "epochs": 4}
CNN: dict[str, Any] = MNIST | {"model.channels": [4, 6], "model.hidden": [16]}
CHARS: dict[str, Any] = {"data.context": 24, "model.width": 16, "model.depth": 1}


def recipe_of(number: int, seed: int, text: Path) -> Recipe:
    """Return the recipe of a training."""
    chars = CHARS | {"data.path": str(text), "epochs": None, "max_steps": 40}
    name, fields = (
        ("mnist-mlp", MLP),
        ("mnist-mlp", MLP | {"optimizer": SGD, "schedule": {"name": "constant"}}),
        ("mnist-mlp", MLP | TORCH),
        ("mnist-cnn", CNN | {"epochs": 3}),
        ("chars-transformer", chars),
    )[number % 5]
    return Recipe.load(name, fields | {"seed": seed})


class Planting(ForkServer):
    """A fork server whose workers may have a fault."""

    fault: Fault | None = None

    def spawn(
        self, env: dict[str, str], log: Path, fds: dict[str, int], preload: list[str]
    ) -> int:
        planted = {PLANTED: self.fault.text} if self.fault else {}
        return super().spawn(env | planted, log, fds, [*preload, "planting"])


@contextmanager
def servers() -> Iterator[tuple[Planting, ForkServer]]:
    """Start the fork server of who trains, and that of who audits."""
    with ForkServer() as auditor:
        paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split()]
        os.environ["PYTHONPATH"] = ":".join(paths)
        with Planting() as faulty:
            yield faulty, auditor


@dataclass(frozen=True)
class Planted:
    """A run with one fault."""

    kind: str
    run: Path
    step: int
    """In which it was planted."""
    shown: int
    """The first step that an audit can name."""
    false_from: int
    """The step after which segments begin that are false, too."""
    false_until: int


@dataclass
class Trials:
    """Trainings of one recipe, with and without faults."""

    recipe: Recipe
    out: Path
    server: Planting
    rng: random.Random
    clean: Run = field(init=False)
    redrawn: Counter[str] = field(default_factory=Counter)
    """How many faults had no effect, or ended the training."""
    number: int = 0

    def __post_init__(self) -> None:
        """Train without a fault."""
        self.clean = self.train(self.recipe)

    def path(self) -> Path:
        """Return a new path for a run."""
        self.number += 1
        return self.out / f"run-{self.number}"

    def train(self, recipe: Recipe, fault: Fault | None = None) -> Run:
        """Train in a new directory."""
        self.server.fault = fault
        try:
            return samestep.train(
                recipe,
                workers=self.rng.randint(fault.rank + 1 if fault else 1, 3),
                keep_checkpoints=CHECKPOINTS,
                out=self.path(),
                view=SilentView(),
                server=self.server,
            )
        finally:
            self.server.fault = None

    def plant(self, kind: str) -> Planted:
        """Return a run with a fault of this kind."""
        if kind in INSIDE:
            return self._inside(kind)
        forge: dict[str, Callable[[Path], tuple[int, int, int]]] = {
            "lr": self._resume_with_another_rate,
            "ledger": self._edit_the_ledger,
            "checkpoint": self._swap_a_checkpoint,
        }
        run = Path(shutil.copytree(self.clean.path, self.path()))
        step, first, end = forge[kind](run)
        return Planted(kind, run, step, step, first, end)

    def _inside(self, kind: str) -> Planted:
        """Train with a fault in a worker."""
        while True:
            step = self.rng.randint(1, len(records(self.clean.path)))
            seed = self.rng.randrange(1 << 30)
            fault = Fault(kind, step, self.rng.randrange(3), seed)
            try:
                run = self.train(self.recipe, fault).path
            except TrainingError:
                self.redrawn[f"{kind}: ended the training"] += 1
                continue
            shown = self._first_difference(run)
            if shown is not None:
                return Planted(kind, run, step, shown, shown - 1, shown)
            self.redrawn[f"{kind}: no effect"] += 1

    def _first_difference(self, run: Path) -> int | None:
        """Return the first step that is not that of the correct training, if any."""
        differ = (records(run) != records(self.clean.path)).any(axis=1).nonzero()[0]
        if len(differ):
            return int(differ[0]) + 1
        for step in kept(run):
            ours, theirs = (load(path, step).state for path in (run, self.clean.path))
            if (ours.states != theirs.states).any():
                return step
        return None

    def _resume_with_another_rate(self, run: Path) -> tuple[int, int, int]:
        """Go on from a checkpoint with another rate, and let all files deny it."""
        step = self.rng.choice(kept(run)[:-1])
        rate = self.recipe.to_dict()["optimizer"]["lr"] * self.rng.choice((0.5, 1.001))
        other = self.recipe.changed({"optimizer.lr": rate})
        (run / "recipe.toml").write_text(other.to_toml())
        self._go_on(run, step)
        (run / "recipe.toml").write_text(self.recipe.to_toml())
        for later in kept(run):
            rewrite_checkpoint(run, later, self.recipe)
        rewrite_model(run)
        rewrite_ledger(run, recipe=self.recipe)
        return step + 1, step, len(records(run))

    def _go_on(self, run: Path, step: int) -> None:
        """Forget everything after a checkpoint, and train on from it."""
        (run / "result.json").unlink()
        (run / "model.safetensors").unlink()
        for later in kept(run):
            if later > step:
                shutil.rmtree(checkpoint.path_of(checkpoint.directory_of(run), later))
        samestep.resume(
            run,
            workers=self.rng.randint(1, 3),
            keep_checkpoints=CHECKPOINTS,
            allow_different_numerics=True,
            view=SilentView(),
            server=self.server,
        )

    def _edit_the_ledger(self, run: Path) -> tuple[int, int, int]:
        """Change a bit of a hash, where no checkpoint has the parameters."""
        last = len(records(run))
        step = self.rng.choice([s for s in range(1, last + 1) if s not in kept(run)])
        column, bit = self.rng.randint(1, 2), np.uint64(1 << self.rng.randrange(64))

        def change(chunk: ledger.Records) -> None:
            chunk[chunk[:, 0] == step, column] ^= bit

        rewrite_ledger(run, change)
        return step, step - 1, step

    def _swap_a_checkpoint(self, run: Path) -> tuple[int, int, int]:
        """Take one of another seed; or its optimizer's states alone, and go on."""
        step = self.rng.choice(kept(run)[:-1])
        other = self.train(self.recipe.changed({"seed": self.recipe.seed + 1000}))
        state = load(other.path, step).state
        if self.rng.random() < 0.5:
            rewrite_checkpoint(run, step, states=state.states)
            self._go_on(run, step)
            return step, step - 1, step
        changed: dict[str, Any] = {
            "parameters": state.parameters,
            "states": state.states,
        }
        rewrite_checkpoint(run, step, tail=state.tail, **changed)

        def change(chunk: ledger.Records) -> None:
            claimed = hash_of(state.parameters)
            chunk[chunk[:, 0] == step, 2] = claimed

        rewrite_ledger(run, change)
        return step, step - 1, step + 1


@dataclass
class Findings:
    """What audits have found."""

    full: list[tuple[Planted, Audit]] = field(default_factory=list)
    at_random: list[tuple[float, bool]] = field(default_factory=list)
    """The probability to find a fault, and whether it was found."""
    false_alarms: int = 0
    redrawn: Counter[str] = field(default_factory=Counter)

    def rows(self) -> Iterator[str]:
        """Yield a table by kind."""
        yield "| fault | n | found | at its step | at the first that shows it |"
        yield "|---|---|---|---|---|"
        for kind, name in NAMES.items():
            audits = [pair for pair in self.full if pair[0].kind == kind]
            found = sum(audit.mismatch is not None for _, audit in audits)
            exact = sum(audit.step == planted.step for planted, audit in audits)
            shown = sum(audit.step == planted.shown for planted, audit in audits)
            yield f"| {name} | {len(audits)} | {found} | {exact} | {shown} |"

    def shares(self) -> Iterator[str]:
        """Yield a line for each probability: expected and found."""
        yield "| probability | audits | expected | 95% of the time | found |"
        yield "|---|---|---|---|---|"
        for chance in sorted({chance for chance, _ in self.at_random}):
            hits = [hit for each, hit in self.at_random if each == chance]
            low, high = interval(len(hits), chance)
            yield (
                f"| {chance:.0%} | {len(hits)} | {chance * len(hits):.1f} | "
                f"{low} to {high} | {sum(hits)} |"
            )


def interval(n: int, p: float) -> tuple[int, int]:
    """Return between which numbers a binomial one is in at least 95% of all cases."""
    below = [0.0]
    for k in range(n + 1):
        below.append(below[-1] + math.comb(n, k) * p**k * (1 - p) ** (n - k))
    low = max(k for k in range(n + 1) if below[k] <= 0.025)
    high = min(k for k in range(n + 1) if below[k + 1] >= 0.975 - 1e-12)
    return low, high


def chance_of(planted: Planted, found: Audit, chosen: int) -> float:
    """Return how likely a choice of segments has one that is false."""
    total = len(found.segments)
    false = sum(
        first < planted.false_until and end > planted.false_from
        for first, end in found.segments
    )
    return 1 - math.comb(total - false, chosen) / math.comb(total, chosen)


def audit_of(run: Path, server: ForkServer, rng: random.Random, **how: Any) -> Audit:
    """Audit a run at any placement."""
    workers, exchange = rng.randint(1, 3), rng.choice(("shared", "gloo"))
    return samestep.audit(run, workers=workers, exchange=exchange, server=server, **how)


def run_all(options: argparse.Namespace, out: Path) -> Findings:
    """Plant and audit everything."""
    findings = Findings()
    text = out / "text.py"
    text.write_text("".join(map(inspect.getsource, (random, argparse))))
    with servers() as (faulty, auditor):
        for number in range(options.trainings):
            rng = random.Random(f"{options.seed}/{number}")  # noqa: S311
            where = out / f"training-{number}"
            recipe = recipe_of(number, 100 * options.seed + number, text)
            trials = Trials(recipe, where, faulty, rng)
            honest = audit_of(trials.clean.path, auditor, rng, full=True)
            if honest.mismatch:
                findings.false_alarms += 1
                print(f"FALSE ALARM: {honest.mismatch}", flush=True)
            for _ in range(number, options.faults, options.trainings):
                kind = [*NAMES][len(findings.full) % len(NAMES)]
                planted = trials.plant(kind)
                check(planted, findings, auditor, rng, options.segments)
            findings.redrawn += trials.redrawn
            shutil.rmtree(where)
            print(f"training {number + 1}: {len(findings.full)} faults", flush=True)
    return findings


def check(
    planted: Planted,
    findings: Findings,
    server: ForkServer,
    rng: random.Random,
    segments: list[int],
) -> None:
    """Audit a run with a fault."""
    found = audit_of(planted.run, server, rng, full=True)
    findings.full.append((planted, found))
    if found.step != planted.shown:
        print(f"WRONG: {planted} was found as {found.step}: {found.mismatch}")
    for chosen in segments:
        if chosen <= len(found.segments):
            how = {"segments": chosen, "seed": rng.randrange(1 << 32)}
            drawn = audit_of(planted.run, server, rng, **how)
            chance = chance_of(planted, found, chosen)
            findings.at_random.append((chance, drawn.mismatch is not None))
    shutil.rmtree(planted.run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--trainings", type=int, default=20)
    parser.add_argument("--segments", type=int, nargs="*", default=[2])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checkpoint_writer.WRITING_SHARE = 1e9  # none is left out on a busy machine
    began = time.monotonic()
    findings = run_all(options, Path(tempfile.mkdtemp()))
    print(*findings.rows(), "", *findings.shares(), "", sep="\n")
    for what, times in sorted(findings.redrawn.items()):
        print(f"drawn again: {what}, {times}")
    print(f"{findings.false_alarms} false alarms in {options.trainings} correct runs")
    print(f"{time.monotonic() - began:.0f} s")
    wrong = sum(found.step != planted.shown for planted, found in findings.full)
    if wrong or findings.false_alarms:
        raise SystemExit(f"{wrong} faults were not found at their step")


if __name__ == "__main__":
    cleanup.run(main)
