"""Trains under a schedule of faults and compares with an undisturbed one.

The schedule depends on the seed only.
"""

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from samestep.api.run import Run
from samestep.api.train import train
from samestep.chaos.plan import KINDS, Injection, plan
from samestep.chaos.trial import Trial, last_step
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import PlacementError, RunError, did_you_mean


KILLS_PER_RUN = 10


@dataclass
class Report:
    """The faults of all disturbed trainings, and the fingerprints they ended with."""

    undisturbed: str
    """The fingerprint of the undisturbed training."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def fingerprints(self) -> list[str]:
        """Those that the disturbed trainings ended with."""
        runs = [Run.open(trial.directory) for trial in self.trials]
        return [run.weights_sha256 for run in runs]

    @property
    def is_identical(self) -> bool:
        """Whether all weights are equal and no process was left behind."""
        same = all(sha256 == self.undisturbed for sha256 in self.fingerprints)
        return same and not any(trial.leftovers for trial in self.trials)

    @property
    def table(self) -> Table:
        """One row per fault: what was injected, and what it cost."""
        rows = Table(box=None, pad_edge=False)
        for name in ("run", "fault", "where", "step", "worker"):
            rows.add_column(name)
        for name in ("detected", "redone", "downtime"):
            rows.add_column(name, justify="right")
        for number, trial in enumerate(self.trials, 1):
            for injection in sorted(trial.injections, key=lambda i: i.at or 0.0):
                rows.add_row(str(number), *_cells(injection))
        return rows

    @property
    def summary(self) -> str:
        """The fingerprints and the verdict."""
        kinds = [i.kind for trial in self.trials for i in trial.injections]
        kills = kinds.count("kill")
        leftovers = sum(trial.leftovers for trial in self.trials)
        lines = [f"undisturbed  sha256 {self.undisturbed}"]
        lines += [f"disturbed    sha256 {sha256}" for sha256 in self.fingerprints]
        verdict = "identical" if self.is_identical else "DIFFERENT"
        lines.append(
            f"{kills} kills and {len(kinds) - kills} other faults injected, "
            f"{leftovers} processes left behind: {verdict}"
        )
        return "\n".join(lines)


def run_chaos(
    recipe: Recipe,
    kills: int,
    seed: int,
    kinds: list[str],
    workers: int,
    out: Path | None,
) -> Report:
    """Train once undisturbed, and once for every ten kills under faults.

    Raises UsageError for unknown kinds of faults or a directory that cannot be made,
    and TrainingError if a training fails in spite of its restarts.
    """
    _check_kinds(kinds)
    out = _new_directory(out)
    recipe_file = out / "recipe.toml"
    recipe_file.write_text(recipe.to_toml())
    calm = train(recipe, Placement(workers=workers, out=out / "undisturbed"))
    total = last_step(calm.path)
    parts = [min(KILLS_PER_RUN, kills - k) for k in range(0, kills, KILLS_PER_RUN)]
    plans = [
        plan(seed + index, part, kinds, total, workers)
        for index, part in enumerate(parts)
    ]
    report = Report(calm.weights_sha256)
    while plans:
        number = len(report.trials) + 1
        trial = Trial(
            recipe=recipe_file,
            out=out / f"disturbed-{number}",
            injections=plans.pop(0),
            workers=workers,
            most_workers=min(recipe.micro_batches, workers + 2),
            rng=random.Random(seed + number),  # noqa: S311  not a secret
        )
        trial.out.mkdir()
        trial.run()
        # A training may end before all of its faults were due: another one gets them.
        if missed := trial.take_missed():
            plans.insert(0, missed)
        report.trials.append(trial)
    return report


def _check_kinds(kinds: list[str]) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise PlacementError(
            f"Faults are any of {', '.join(KINDS)}; received `{unknown[0]}`."
            f"{did_you_mean(unknown[0], KINDS)}"
        )


def _new_directory(out: Path | None) -> Path:
    out = out or Path("runs") / f"chaos-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"The directory {out} cannot be made: {error.strerror}. Choose another "
            "with `--out`."
        ) from None
    return out


def _cells(injection: Injection) -> list[str]:
    redone = "-" if injection.redone is None else f"{injection.redone} steps"
    return [
        injection.kind,
        injection.point if injection.point != injection.kind else "",
        str(injection.step),
        str(injection.rank) if injection.hits_one_worker else "all",
        _seconds(injection.detected),
        redone,
        _seconds(injection.downtime),
    ]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
