"""Small run directories and scalings for the tests of reports."""

import json
import math
from pathlib import Path
from typing import Any

import tomli_w


Json = dict[str, Any]
PHASES = ("data", "forward", "backward", "exchange", "wait", "optimizer", "other")
SHARES = (0.04, 0.27, 0.33, 0.1, 0.06, 0.15, 0.05)

RECIPE: Json = {
    "name": "mnist-mlp",
    "seed": 0,
    "epochs": 3,
    "global_batch": 256,
    "micro_batches": 4,
    "data": {"source": "mnist", "validation": 5000},
    "model": {"family": "mlp", "hidden": [512, 256, 128], "dropout": 0.0},
    "optimizer": {"name": "adamw", "lr": 0.004, "betas": [0.7, 0.9]},
}
ENVIRONMENT: Json = {
    "machine": "x86_64",
    "system": "Linux-6.1.0-x86_64-with-glibc2.36",
    "processor": "AMD EPYC 9654 96-Core Processor",
    "logical_cpus": 4,
    "physical_cores": 2,
    "affinity": [0, 1, 3],
    "usable_cores": 2,
    "usable_cores_because": "the physical cores of this machine",
    "cpu_quota": None,
    "memory_bytes": 25_276_502_016,
    "memory_limit_bytes": 8_589_934_592,
    "caches": {"L1d": 32_768, "L2": 1_048_576, "L3": 33_554_432},
    "python": "3.11.7",
    "libraries": {"samestep": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "thread_variables": {"OMP_NUM_THREADS": "1"},
    "data": {"source": "mnist", "files": {"train": {"bytes": 9, "sha256": "ab" * 32}}},
}


def phases(seconds: float, tilt: float = 0.0) -> Json:
    """Seconds by phase that add up to `seconds`; `tilt` moves some to waiting."""
    shares = dict(zip(PHASES, SHARES, strict=True))
    shares["wait"] += tilt
    shares["backward"] -= tilt
    return {name: seconds * share for name, share in shares.items()}


def step(number: int, epoch: int, **fields: Any) -> Json:
    """A line of metrics.jsonl."""
    done = number / 645
    return {
        "type": "step",
        "epoch": epoch,
        "step": number,
        "loss": 2.3 * math.exp(-7 * done) + 0.08 + 0.03 * math.sin(number * 1.7),
        "accuracy": 0.985 - 0.85 * math.exp(-8 * done) + 0.008 * math.sin(number * 2.3),
        "lr": 0.004 * math.sin(math.pi * min(1.0, done + 0.05)),
        "samples_per_second": 27_000 + 900 * math.sin(number / 9),
        "at": 0.4 + number * 0.0099,
        "workers": [phases(0.0089), phases(0.0089, 0.05)],
        "speeds": [1.0, 1.05],
        "shares": [2, 2],
        "waited_for": [0.0009, 0.0004],
        "communication_share": 0.16 + 0.02 * math.sin(number / 11),
        "straggler_share": 0.06 + 0.01 * math.cos(number / 7),
        "bytes_exchanged": 4_540_000,
        "noise_scale": 90 * math.exp(3 * done) + 9 * math.sin(number),
    } | fields


def epoch(number: int, **fields: Any) -> Json:
    """An element of `epochs` in result.json."""
    return {
        "epoch": number,
        "seconds": 1.93 + 0.07 / number,
        "train_loss": 0.31 / number**1.2,
        "train_accuracy": 1 - 0.09 / number**1.3,
        "validation_loss": 0.16 / number**0.7,
        "validation_accuracy": 1 - 0.045 / number**0.8,
        "samples_per_second": 26_100.0 + 400 * number,
        "seconds_by_phase": phases(1.95, 0.02),
        "workers": [phases(1.95), phases(1.95, 0.05)],
        "waited_for": [0.21, 0.11],
        "communication_share": 0.17,
        "straggler_share": 0.07,
        "bytes_exchanged": 976_000_000,
        "noise_scale": 300.0 * number,
        "weights_sha256": f"{number:x}" * 64,
    } | fields


def confusion() -> list[list[int]]:
    """Ten classes of 1,000 samples each."""
    return [
        [
            982 - 2 * row if row == column else (row * 7 + column * 3) % 4
            for column in range(10)
        ]
        for row in range(10)
    ]


def result(**fields: Any) -> Json:
    """The content of result.json."""
    return {
        "recipe": RECIPE,
        "placement": {"workers": 2, "exchange": "shared", "balance": "auto"},
        "status": "finished",
        "test_accuracy": 0.9834,
        "test_loss": 0.0553,
        "weights_sha256": "3" * 64,
        "train_seconds": 5.9,
        "wall_seconds": 8.3,
        "restarts": 1,
        "snapshot_seconds": 0.012,
        "balance": {"saved": 0.0},
        "noise_scale": 912.5,
        "test_confusion": confusion(),
        "test_worst": [
            {"index": at * 31, "target": at % 10, "predicted": 3, "loss": 9.5 - at / 2}
            for at in range(12)
        ],
        "epochs": [epoch(1), epoch(2), epoch(3)],
    } | fields


EVENTS: list[Json] = [
    {"seconds": 0.05, "event": "started", "workers": 2, "exchange": "shared"},
    {"seconds": 0.1, "event": "workers started", "pids": [1, 2]},
    {"seconds": 0.3, "event": "training", "step": 0, "steps_per_epoch": 215},
    {"seconds": 2.4, "event": "epoch", "epoch": 1, "sha256": "1" * 64},
    {"seconds": 2.5, "event": "checkpoint", "step": 215, "seconds_to_write": 0.02},
    {"seconds": 3.1, "event": "failed", "error": "Worker 1 was killed (SIGKILL).",
     "worker": 1, "step": 260},
    {"seconds": 3.2, "event": "restart", "number": 1, "step": 251, "workers": 2},
    {"seconds": 3.3, "event": "caught up", "step": 260, "after": 0.21},
    {"seconds": 3.9, "event": "rebalanced", "before": [2, 2], "after": [1, 3],
     "step": 320, "gain": 0.1, "cause": "speed"},
    {"seconds": 5.0, "event": "epoch", "epoch": 2, "sha256": "2" * 64},
    {"seconds": 7.4, "event": "epoch", "epoch": 3, "sha256": "3" * 64},
    {"seconds": 7.6, "event": "checkpoint", "step": 645, "seconds_to_write": 0.02},
    {"seconds": 8.3, "event": "finished"},
]  # fmt: skip


def write_lines(path: Path, records: list[Json]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(path: Path, *, ended: bool = True, **fields: Any) -> Path:
    """A run directory; without result.json unless it has `ended`."""
    path.mkdir(parents=True, exist_ok=True)
    content = result(**fields)
    steps = [step(n, 1 + (n - 1) // 215) for n in range(5, 646, 5)]
    epochs = [{"type": "epoch", "at": 2.4} | record for record in content["epochs"]]
    write_lines(path / "metrics.jsonl", steps + epochs)
    write_lines(path / "events.jsonl", EVENTS)
    (path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (path / "recipe.toml").write_text(tomli_w.dumps(RECIPE))
    if ended:
        (path / "result.json").write_text(json.dumps(content))
    return path


def point(kind: str, workers: int, batch: int, speedup: float, **fields: Any) -> Json:
    """An element of `points` in scaling.json."""
    rate = 14_200.0 * speedup * (1 + batch / 2_000)
    limit = None if kind == "limit" else workers * (1 - 0.02 * (workers - 1))
    samples = batch if kind != "weak" else batch * workers
    return {
        "kind": kind,
        "workers": workers,
        "global_batch": samples,
        "micro_batches": 8,
        "exchange": "shared",
        "samples_per_second": rate,
        "low": rate * 0.98,
        "high": rate * 1.02,
        "step_seconds": samples / rate,
        "seconds_by_phase": phases(samples / rate, 0.04 * (workers - 1) / workers),
        "speedup": speedup,
        "speedup_low": speedup * 0.975,
        "speedup_high": speedup * 1.02,
        "efficiency": speedup / workers,
        "limit_speedup": limit,
        "efficiency_of_limit": None if limit is None else speedup / limit,
    } | fields


def prediction(where: str, workers: int, nodes: int, speedup: float) -> Json:
    """An element of `predictions` in scaling.json."""
    spread = 0.02 * math.log2(workers)
    return {
        "where": where,
        "workers": workers,
        "nodes": nodes,
        "global_batch": 64,
        "samples_per_second": 14_200.0 * speedup,
        "low": 14_200.0 * speedup * (1 - spread),
        "high": 14_200.0 * speedup * (1 + spread),
        "speedup": speedup,
        "efficiency": speedup / workers,
        "relative_time_to_loss": 1 / speedup,
    }


def scaling(**fields: Any) -> Json:
    """The content of scaling.json."""
    speedups = ((1, 1.0), (2, 1.86), (3, 2.64), (4, 3.31))
    wide = ((1, 1.0), (2, 1.95), (3, 2.86), (4, 3.74))
    return {
        "version": 1,
        "recipe": RECIPE,
        "environment": ENVIRONMENT,
        "status": "finished",
        "settings": {
            "workers": [1, 2, 3, 4],
            "global_batches": [64, 256],
            "weak": True,
            "exchange": "shared",
            "rounds": 5,
            "seconds_per_run": 1.0,
            "nodes_up_to": 16,
            "bandwidth_bytes_per_second": 1.25e9,
            "latency_seconds": 5e-5,
        },
        "points": [
            *(point("strong", n, 64, speedup) for n, speedup in speedups),
            *(point("strong", n, 256, speedup) for n, speedup in wide),
            *(point("weak", n, 64, n * (1.01 - 0.01 * n)) for n, _ in speedups),
            *(point("limit", n, 64, n * (1.02 - 0.02 * n)) for n in (2, 3, 4)),
        ],
        "noise": {"noise_scale": 410.0, "critical_batch": 410.0, "at_global_batch": 64},
        "model": {
            "formula": "t(n) = alpha M/n + beta B/n + gamma log2(n) + delta V/n",
            "parameters": [
                {"name": "alpha", "value": 2.1e-5, "low": 1.9e-5, "high": 2.4e-5,
                 "unit": "s", "meaning": "fixed cost of a micro-batch"},
                {"name": "beta", "value": 6.6e-5, "low": 6.4e-5, "high": 6.9e-5,
                 "unit": "s per sample", "meaning": "computing"},
            ],
            "median_error": 0.013,
            "max_error": 0.041,
        },
        "no_fit_because": None,
        "held_out": {"workers": 4, "global_batch": 64, "predicted": 47_900.0,
                     "measured": 47_000.0, "error": 0.019},
        "predictions": [
            prediction("machine", 6, 1, 4.4),
            prediction("machine", 8, 1, 5.2),
            *(prediction("nodes", n, n // 4, n**0.72) for n in (8, 16, 32, 64)),
        ],
        "advice": [
            "2 workers: 1.86 times the speed of one.",
            "Beyond 6 nodes the network eats the gain.",
        ],
    } | fields  # fmt: skip


def write_scaling(path: Path, **fields: Any) -> Path:
    """A directory with a scaling.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "scaling.json").write_text(json.dumps(scaling(**fields)))
    return path
