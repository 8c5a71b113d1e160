"""Several machines: their throughput, and what the model says of it.

    python benchmarks/nodes.py throughput   4 hosts, predicted from 1 and 2
    python benchmarks/nodes.py dilated      6 and 8 hosts, predicted from 1, 2, 3 and 4

Needs root: the hosts are network namespaces (hosts.py) with 1 Gbit/s each, one worker
on each. Where they compute, a CPU quota lets all of them run at the same time on 2
cores: 0.4 of a core each, or a fifth (`dilated`); as in dilated.py, idle processes keep
the cores awake. Rounds measure every number of hosts once, in an order of their own,
and are appended to `--out`: the same command again adds rounds.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cleanup
from dilated import awake
from hosts import Network

from samestep.scaling.step_model import MEANING, Model, expected_maximum, work
from samestep.scaling.step_model import Network as Links
from samestep.system import machine


RESULTS = Path(__file__).parent / "results"
RECIPE = "mnist-mlp-classic"
PORT, PERIOD_US = 29400, 10_000
BANDWIDTH, LATENCY = 1e9 / 8, 50e-6
"""Bytes per second, as the links have; seconds, as between two of these hosts."""
SETTLE, PATIENCE = 3, 120.0
"""Records left out after the start of a training; seconds until the next one."""
GRADIENT_BYTES = 4 * 567_434
Fields = dict[str, Any]

SCENARIOS: dict[str, Fields] = {
    "throughput": {"seen": (1, 2), "hidden": (4,), "cores": 0.4, "micro_batches": 32},
    "dilated": {
        "seen": (1, 2, 3, 4),
        "hidden": (6, 8),
        "cores": 0.2,
        "micro_batches": 24,  # even shares for every count
    },
}


def measured(hosts: int, scenario: Fields, seconds: float) -> Fields:
    """Seconds of a step by phase, mean over workers; the training is then killed."""
    micro = scenario["micro_batches"]
    with tempfile.TemporaryDirectory() as directory, Network("1gbit") as network:
        made = [network.add() for _ in range(hosts)]
        for host in made:
            host.limit_cpu(1.0, PERIOD_US)
            command = [
                *(sys.executable, "-m", "samestep", "train", RECIPE),
                *("--nodes", str(hosts), "--rdzv-endpoint", f"{made[0].name}:{PORT}"),
                *("--interface", "10.0.0.0/24", "--workers", "1", "--epochs", "99"),
                *("--global-batch", str(64 * micro), "--micro-batches", str(micro)),
                *("--balance", "off", "--no-tensorboard", "--no-report"),
                *("--out", f"{directory}/{host.name}/run"),
            ]
            log = Path(directory, f"{host.name}.log")
            with log.open("w") as output:
                host.start(command, stdout=output, stderr=output)
        found = records(Path(directory, made[0].name, "run", "metrics.jsonl"), log)
        next(found)
        for host in made:
            host.limit_cpu(scenario["cores"])
        for _ in range(SETTLE):
            next(found)
        steps: list[Fields] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(steps) < 2:
            steps.append(next(found))
    return summed(steps)


def records(file: Path, log: Path) -> Iterator[Fields]:
    """Yield the records of steps, as they are written."""
    seen, end = 0, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        text = file.read_text() if file.exists() else ""
        lines = [line for line in text.splitlines(True) if line.endswith("\n")]
        for line in lines[seen:]:
            record = json.loads(line)
            if record["type"] == "step":
                yield record
                end = time.monotonic() + PATIENCE
        seen = len(lines)
        time.sleep(0.05)
    raise TimeoutError(f"no steps: {log.read_text()}")


def summed(steps: list[Fields]) -> Fields:
    """Return the median seconds per step; of phases, the mean over workers."""
    counts = [b["step"] - a["step"] for a, b in pairwise(steps)]
    rows = list(zip(steps[1:], counts, strict=True))
    phases = {
        phase: statistics.median(
            statistics.fmean(worker[phase] for worker in record["workers"]) / count
            for record, count in rows
        )
        for phase in rows[0][0]["workers"][0]
    }
    return {"step": sum(phases.values()), "records": len(rows), **phases}


def fitted(seen: dict[int, Fields], scenario: Fields) -> Model:
    """Fit to every number of hosts that the model may see; one worker on each."""
    micro, links = scenario["micro_batches"], Links(BANDWIDTH, LATENCY)
    batch, one = 64 * micro, seen[1]
    found = dict.fromkeys(MEANING, 0.0) | {"q": 1.0}
    model = Model(found, "shared", cores=1, gradient_bytes=GRADIENT_BYTES)
    computed = [
        (o["data"] + o["forward"] + o["backward"]) * hosts for hosts, o in seen.items()
    ]
    found["alpha"] = statistics.fmean(computed) / micro
    found["u0"] = statistics.fmean(o["optimizer"] for o in seen.values())
    rest = [o["other"] + o["snapshot"] for o in seen.values()]
    found["o0"] = statistics.fmean(rest)
    found["e0"] = one["exchange"]
    waits, bytes_cost = [], []
    for hosts, o in seen.items():
        if hosts == 1:
            continue
        done = work(1, batch, micro, hosts)
        compute = max(model.compute(done, 1))
        waits.append(o["wait"] / (expected_maximum(hosts) * compute**0.5))
        moved = o["exchange"] - found["e0"] - model.network_seconds(done, links)
        sent = (done.node_rows + 1) * (hosts - 1) / hosts * GRADIENT_BYTES
        bytes_cost.append(moved / sent)
    found["nu"] = statistics.fmean(waits)
    found["tau"] = max(0.0, statistics.fmean(bytes_cost))
    return model


def compare(rounds: list[dict[str, Fields]], scenario: Fields) -> None:
    """Compare predictions from the few hosts with what the many do."""
    micro, links = scenario["micro_batches"], Links(BANDWIDTH, LATENCY)
    counts = (*scenario["seen"], *scenario["hidden"])
    medians = {
        hosts: {
            phase: statistics.median(run[str(hosts)][phase] for run in rounds)
            for phase in rounds[0][str(hosts)]
        }
        for hosts in counts
    }
    model = fitted({h: medians[h] for h in scenario["seen"]}, scenario)
    tau = 1e9 * model.parameters["tau"]
    print(f"n={len(rounds)} rounds; tau {tau:.2f} ns per byte")
    print("hosts  predicted  measured (range)          error   exchange  wait")
    for hosts in counts:
        batch, of = 64 * micro, medians[hosts]
        predicted = batch / model.step(work(1, batch, micro, hosts), links)
        rates = sorted(batch / run[str(hosts)]["step"] for run in rounds)
        rate = batch / of["step"]
        note = "" if hosts in scenario["seen"] else "  not seen"
        print(
            f"{hosts:5} {predicted:10,.0f} {rate:9,.0f} ({rates[0]:,.0f} to "
            f"{rates[-1]:,.0f}) {predicted / rate - 1:+6.1%} "
            f"{of['exchange'] / of['step']:6.0%} {of['wait'] / of['step']:6.0%}{note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    scenario = SCENARIOS[options.scenario]
    counts = (*scenario["seen"], *scenario["hidden"])
    out = options.out or RESULTS / f"hosts-{options.scenario}.json"
    rounds = json.loads(out.read_text())["rounds"] if out.exists() else []
    for number in range(len(rounds), len(rounds) + options.rounds):
        order = random.Random(number).sample(counts, len(counts))  # noqa: S311
        with awake():
            rounds.append(
                {str(n): measured(n, scenario, options.seconds) for n in order}
            )
        record = {"machine": machine.describe(), "rounds": rounds}
        out.write_text(json.dumps(record, indent=1) + "\n")
    compare(rounds, scenario)


if __name__ == "__main__":
    cleanup.run(main)
