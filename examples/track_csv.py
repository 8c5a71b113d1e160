"""A tracker that writes every step to a CSV file in the run directory.

samestep train --tracker track_csv:track
"""

import csv
from pathlib import Path
from typing import Any


COLUMNS = ("step", "epoch", "loss", "accuracy", "lr", "samples_per_second")


class Table:
    """A file for each `train` or `resume`, named by the step at which it begins."""

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record: one of metrics.jsonl, or the first or last one of a run."""
        if record["type"] == "started":
            name = f"steps-from-{record['step']}.csv"
            self.file = (Path(record["run"]) / name).open("w", newline="")
            csv.writer(self.file).writerow(COLUMNS)
        elif record["type"] == "step":
            csv.writer(self.file).writerow([record[column] for column in COLUMNS])
        elif record["type"] != "epoch":  # finished, failed or interrupted
            self.file.close()


track = Table()
