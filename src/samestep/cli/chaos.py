"""`samestep chaos`: trains while everything fails, and shows that nothing was lost.

One undisturbed training, then others of the same recipe under a schedule of faults that
only the seed determines.
"""

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from samestep.api.run import Run
from samestep.api.train import train
from samestep.chaos.plan import KINDS, plan
from samestep.chaos.trial import Trial, last_step
from samestep.config.placement import Placement
from samestep.config.recipe import Recipe
from samestep.errors import PlacementError, RunError, did_you_mean


KILLS_PER_RUN = 10


@dataclass
class Report:
    """The verdict of all ordeals."""

    calm: str
    """The fingerprint of the undisturbed training."""
    ordeals: list[Trial] = field(default_factory=list)
    fingerprints: list[str] = field(default_factory=list)

    @property
    def is_identical(self) -> bool:
        """Whether no bit differs and no process was left."""
        return all(found == self.calm for found in self.fingerprints) and not any(
            trial.leftovers for trial in self.ordeals
        )

    @property
    def table(self) -> Table:
        """What was injected, and what it cost."""
        return _table(self.ordeals)

    @property
    def summary(self) -> str:
        """The fingerprints and the verdict."""
        happened = [i.kind for trial in self.ordeals for i in trial.injections]
        kills = happened.count("kill")
        others = len(happened) - kills
        leftovers = sum(trial.leftovers for trial in self.ordeals)
        lines = [f"undisturbed  sha256 {self.calm}"]
        lines += [f"disturbed    sha256 {found}" for found in self.fingerprints]
        lines.append(
            f"{kills} kills and {others} other faults injected, {leftovers} processes "
            "left behind: "
            f"{'identical' if self.is_identical else 'DIFFERENT'}"
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
    """One undisturbed training and one for every ten kills. Raises UsageError."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise PlacementError(
            f"Faults are any of {', '.join(KINDS)}; received `{unknown[0]}`."
            f"{did_you_mean(unknown[0], KINDS)}"
        )
    out = out or Path("runs") / f"chaos-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise RunError(
            f"The directory {out} cannot be made: {error.strerror}. Choose another "
            "with `--out`."
        ) from None
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
        number = len(report.ordeals) + 1
        trial = Trial(
            recipe=recipe_file,
            out=out / f"disturbed-{number}",
            injections=plans.pop(0),
            workers=workers,
            most_workers=min(recipe.micro_batches, workers + 2),
            chance=random.Random(seed + number),  # noqa: S311  not a secret
        )
        trial.out.mkdir()
        trial.undergo()
        if missed := trial.take_missed():
            plans.insert(0, missed)
        report.ordeals.append(trial)
        report.fingerprints.append(Run.open(trial.run).weights_sha256)
    return report


def _table(ordeals: list[Trial]) -> Table:
    """What was injected, and what it cost."""
    shown = Table(box=None, pad_edge=False)
    for name in ("run", "fault", "where", "step", "worker"):
        shown.add_column(name)
    for name in ("detected", "redone", "downtime"):
        shown.add_column(name, justify="right")
    for index, trial in enumerate(ordeals, 1):
        for injection in sorted(trial.injections, key=lambda i: i.at or 0.0):
            shown.add_row(
                str(index),
                injection.kind,
                injection.point if injection.point != injection.kind else "",
                str(injection.step),
                str(injection.rank) if injection.hits_one_worker else "all",
                _seconds(injection.detected),
                "-" if injection.redone is None else f"{injection.redone} steps",
                _seconds(injection.downtime),
            )
    return shown


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"
