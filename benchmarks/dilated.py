"""Checks the predictions of `samestep scale` on workers that really run in parallel.

    python benchmarks/dilated.py --out /tmp/dilated          (the same again: goes on)

A time-dilated cluster: every worker gets a fifth of a core by a CPU quota (cgroup v1 or
v2; needs root), so 8 workers run at the same time on 2 cores, each as slowly as if all
of its machine were slower. 1, 2, 3, 4, 6 and 8 workers are measured, interleaved; the
model sees 1 to 4 only, and predicts 6 and 8.

A processor that idles for most of the time gets slower (sleep states, and on virtual
machines other tenants), so few workers would look slower than many: processes of idle
priority, which give way to all others, keep every core awake.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cleanup
from quota import Quota

from samestep.config.recipe import Recipe
from samestep.data.sources import source_of
from samestep.scaling.fit import fit, observations
from samestep.scaling.grid import Settings, grid
from samestep.scaling.measure import measure
from samestep.scaling.progress import show_progress
from samestep.scaling.study import Study, open_study
from samestep.supervisor.forkserver_client import ForkServer
from samestep.system import machine
from samestep.system.signals import stop_on_signals


SEEN, HIDDEN = (1, 2, 3, 4), (6, 8)
SHARE, PERIOD_US = 0.2, 10_000
MICRO_BATCHES = 24
"""Even shares for every count."""


class Brakes:
    """The quotas of the workers that run now."""

    def __init__(self) -> None:
        self._quotas: list[Quota] = []

    def apply(self, pids: list[int]) -> None:
        """Limit new workers; the earlier ones have ended."""
        self.release()
        self._quotas = [Quota(pid, SHARE, PERIOD_US) for pid in pids]

    def release(self) -> None:
        """Release the limits, after the workers have ended."""
        for quota in self._quotas:
            quota.close()
        self._quotas = []


@contextmanager
def awake() -> Iterator[None]:
    """Keep every core awake meanwhile."""
    spin = "import os\nos.sched_setaffinity(0, [{}])\n"
    spin += (
        "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\nwhile True: pass"
    )
    cores = sorted(os.sched_getaffinity(0))
    command = (sys.executable, "-S", "-c")
    spinners = [subprocess.Popen([*command, spin.format(core)]) for core in cores]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def measured(options: argparse.Namespace) -> Study:
    overrides = {
        "micro_batches": MICRO_BATCHES,
        "global_batch": MICRO_BATCHES * options.samples,
    }
    recipe = Recipe.load("mnist-mlp-classic", overrides)
    settings = Settings(
        workers=(*SEEN, *HIDDEN),
        global_batches=(recipe.global_batch,),
        exchange=options.exchange,
        rounds=options.rounds,
        seconds_per_run=options.seconds,
    )
    source_of(recipe.data).prepare()
    points = grid(settings, recipe.micro_batches)
    brakes = Brakes()
    with (
        open_study(options.out, recipe, machine.describe(), settings, points) as study,
        ForkServer() as server,
        show_progress() as watcher,
        stop_on_signals() as stop,
        awake(),
    ):
        try:
            measure(study, server, stop, watcher, options.warm_up, brakes.apply)
        finally:
            brakes.release()
    return study


def compare(study: Study) -> None:
    """Compare predictions from the few workers with what the many do."""
    seen = observations(study.runs)
    few = [o for o in seen if o.together <= max(SEEN)]
    n, exchange = study.gradient_bytes, study.settings.exchange
    model = fit(few, exchange, cores=max(HIDDEN), gradient_bytes=n)
    print(f"samples per second, n={study.settings.rounds} rounds")
    print("workers  predicted   measured (range)            error")
    hidden = []
    for o in seen:
        if o.point.kind != "strong":
            continue
        batch = o.point.global_batch
        predicted = batch / model.step(o.work)
        error = predicted * o.step / batch - 1
        note = "" if o.together in SEEN else "  not seen"
        each = sorted(batch * run.steps / run.seconds for run in study.runs[o.point])
        found = f"{batch / o.step:10,.0f} ({each[0]:,.0f} to {each[-1]:,.0f})"
        print(f"{o.together:7} {predicted:10,.0f} {found:28} {error:+6.1%}{note}")
        if o.together in HIDDEN:
            hidden.append(abs(error))
    print(
        f"not seen: median error {statistics.median(hidden):.1%}, worst "
        f"{max(hidden):.1%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument(
        "--warm-up", type=float, default=2.0, help="seconds before them"
    )
    parser.add_argument("--samples", type=int, default=64, help="per micro-batch")
    parser.add_argument("--exchange", choices=["shared", "gloo"], default="shared")
    compare(measured(parser.parse_args()))


if __name__ == "__main__":
    cleanup.run(main)
