"""A tracker that logs to Weights & Biases, or to trackio, which has the same API.

WANDB_MODE=offline samestep train --tracker track_wandb:track
TRACK_WITH=trackio samestep train --tracker track_wandb:track

After `samestep resume`, trackio continues its run of the same name; wandb does so if
WANDB_RUN_ID is set to the same value both times.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any


class Run:
    """Logs numbers only; those of epochs and the test get the step before them."""

    step = 0

    def __call__(self, record: dict[str, Any]) -> None:
        """Log a record: one of metrics.jsonl, or the first or last one of a run."""
        library = import_module(os.environ.get("TRACK_WITH", "wandb"))
        kind = record.pop("type")
        if kind == "started":
            name, config = Path(record["run"]).name, record["recipe"]
            library.init(project="samestep", name=name, config=config, resume="allow")
        self.step = record.get("step", self.step)
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        if kind == "epoch":
            numbers = {f"epoch/{key}": value for key, value in numbers.items()}
        if kind != "started":
            library.log(numbers, step=self.step)
        if kind in ("finished", "failed", "interrupted"):
            library.finish()


track = Run()
