"""Bars of the epoch times that `benchmarks/compare.py --save` has measured."""

import json
from pathlib import Path

from language import Drawing


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAMES = {
    "samestep-2": "samestep, 2 workers",
    "samestep-1": "samestep, 1 worker",
    "plain-1": "plain loop, 1 thread",
    "plain-2": "plain loop, 2 threads",
    "ddp-2": "DDP over Gloo, 2",
    "accelerate-2": "Accelerate, 2",
    "lightning-2": "Lightning, 2",
    "jax-2": "JAX, 2 cores",
}
LEFT, RIGHT, ROW, TOP = 204, 490, 36, 68


def draw(global_batch: int) -> str:
    """Return docs/epoch-<global batch>.svg: medians, fastest first."""
    found = json.loads((RESULTS / f"classic-{global_batch}.json").read_text())["rows"]
    rows = sorted(found, key=lambda row: row["epoch_seconds"])
    drawing = Drawing(
        TOP + ROW * len(rows) + 12,
        f"Seconds per epoch at global batch {global_batch}: "
        + ", ".join(f"{NAMES[r['contender']]} {r['epoch_seconds']:.2f}" for r in rows)
        + ".",
    )
    head = f"Seconds per epoch, global batch {global_batch}"
    drawing.lines(24, 34, head, "median, and lowest to highest, of 5 rounds")
    scale = (RIGHT - LEFT) / max(row["epoch_seconds_max"] for row in rows)
    for at, row in enumerate(rows):
        _bar(drawing, TOP + ROW * at, row, scale)
    return drawing.svg()


def _bar(drawing: Drawing, y: float, row: dict[str, float], scale: float) -> None:
    name = NAMES[str(row["contender"])]
    is_ours = name.startswith("samestep")
    low, middle, high = (
        LEFT + scale * row[f"epoch_seconds{end}"] for end in ("_min", "", "_max")
    )
    drawing.text(
        LEFT - 10, y + 19, name, "ink b small" if is_ours else "ink small", "end"
    )
    drawing.box(LEFT, y + 3, middle - LEFT, 22, "w0" if is_ours else "line", radius=3)
    drawing.path(f"M{low:.1f} {y + 14}H{high:.1f}", "edge s-ink")
    drawing.text(
        high + 8, y + 19, f"{row['epoch_seconds']:.2f}", "ink b small", "start"
    )
