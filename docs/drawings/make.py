"""Draws docs/*.svg: `python docs/drawings/make.py`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import architecture
import dataflow
import epochs
import ownership
import step


DOCS = Path(__file__).parents[1]
DRAWINGS: dict[str, Callable[[], str]] = {
    "architecture.svg": architecture.draw,
    "dataflow.svg": dataflow.draw,
    "epoch-64.svg": partial(epochs.draw, 64),
    "epoch-512.svg": partial(epochs.draw, 512),
    "step.svg": step.draw,
    "tree.svg": ownership.draw,
}


if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
