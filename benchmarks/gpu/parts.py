"""The parts of the run, in the order of what may be given up last."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from gpu import exact, product, refusals, speed
from gpu.report import Report
from gpu.sizes import Sizes
from samestep.models import device
from samestep.system import machine


@dataclass(frozen=True)
class Part:
    """One part."""

    seconds: float
    """Its deadline."""
    run: Callable[[Sizes, Report], None]
    needs_gpu: bool = False
    is_timed: bool = True
    """Whether it is alone on the machine."""


def environment(sizes: Sizes, report: Report) -> None:
    """Name what everything depends on."""
    gpus = device.gpus()
    report.figures |= {
        "torch": torch.__version__,
        "gpus": list(gpus.names),
        "software": gpus.software or gpus.why,
        "cores": machine.usable_cores()[0],
        "machine": platform.platform(),
        **device.build(),
    }
    if sizes.device == "cuda" and not gpus.names:
        raise RuntimeError(f"`--device cuda` needs a GPU: {gpus.why}")


PARTS = {
    "environment": Part(20, environment),
    "product-on-host": Part(20, product.on_host),
    "product-on-gpu": Part(30, product.on_gpu, needs_gpu=True),
    "speed-samestep": Part(75, speed.ours),
    "speed-eager": Part(20, partial(speed.plain, speed.eager)),
    "speed-deterministic": Part(30, speed.deterministic),
    "speed-graphs": Part(25, partial(speed.plain, speed.captured), needs_gpu=True),
    "profile": Part(25, speed.profile),
    "refusals": Part(25, refusals.refusals),
    "memory": Part(25, refusals.memory, needs_gpu=True),
    **{
        f"exact-{name}": Part(90, partial(exact.exact, name), is_timed=False)
        for name in exact.RECIPES
    },
    "speed-compiled": Part(60, partial(speed.plain, speed.compiled)),
}
SECONDS = 450
"""Deadline of all parts together: with start and end they take less than 8 minutes."""
PATIENCE = 4
"""How many times as much a dry run has, which may share few cores with others."""


def lanes() -> int:
    """Return how many parts that are not timed run at once: 3 workers each."""
    return max(1, min(len(exact.RECIPES), (os.cpu_count() or 1) // 3))
