"""Medians over rounds, with intervals.

Speed-ups are ratios within a round, so that a drift of the machine's speed cancels. An
interval is the 2.5th to 97.5th percentile of a bootstrap over rounds.
"""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from samestep.output import schema
from samestep.scaling.grid import Point
from samestep.scaling.study import Measurement


Runs = Mapping[Point, Sequence[Measurement]]

RESAMPLES = 2_000
INTERVAL = (2.5, 97.5)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its bootstrap interval."""
    array = np.asarray(values)
    # A fixed seed: the same measurements give the same report.
    drawn = np.random.default_rng(0).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(np.median(array[drawn], axis=1), INTERVAL)
    return float(np.median(array)), float(low), float(high)


def band(value: float, resampled: Sequence[float]) -> tuple[float, float]:
    """Return the interval of resampled values, widened so that it holds `value`."""
    low, high = np.percentile(resampled, INTERVAL).tolist()
    return min(low, value), max(high, value)


def base_of(point: Point) -> Point:
    """Return the 1-worker point that a speed-up is relative to."""
    if point.kind == "weak":
        n = point.workers
        return Point("weak", 1, point.global_batch // n, point.micro_batches // n)
    return Point("strong", 1, point.global_batch, point.micro_batches)


def ratios(runs: Runs, point: Point, base: Point) -> list[float]:
    """Return the speed of `point` relative to `base`, in each round that has both."""
    rates = {run.round: run.samples_per_second for run in runs.get(base, ())}
    return [
        run.samples_per_second / rates[run.round]
        for run in runs.get(point, ())
        if run.round in rates
    ]


def summarise(runs: Runs, exchange: str) -> list[schema.Point]:
    """Return the points of scaling.json: all but calibration points."""
    return [
        _summary(runs, point, exchange)
        for point in runs
        if point.kind != "calibration" and runs[point]
    ]


def _summary(runs: Runs, point: Point, exchange: str) -> schema.Point:
    own, base = runs[point], base_of(point)
    rate, low, high = interval([run.samples_per_second for run in own])
    speedup = speedup_low = speedup_high = limit = None
    if speedups := ratios(runs, point, base):
        speedup, speedup_low, speedup_high = interval(speedups)
    if limits := _limit_ratios(runs, point, base):
        limit = statistics.median(limits)
    return schema.Point(
        **point._asdict(),
        exchange=exchange,
        runs=[run.model_dump() for run in own],
        samples_per_second=rate,
        low=low,
        high=high,
        step_seconds=statistics.median(run.seconds / run.steps for run in own),
        seconds_by_phase={
            phase: statistics.fmean(run.per_step(phase) for run in own)
            for phase in own[0].workers[0]
        },
        speedup=speedup,
        speedup_low=speedup_low,
        speedup_high=speedup_high,
        efficiency=speedup / point.workers if speedup else None,
        limit_speedup=limit,
        efficiency_of_limit=speedup / limit if speedup and limit else None,
    )


def _limit_ratios(runs: Runs, point: Point, base: Point) -> list[float]:
    """Return the speed-ups of as many independent trainings, round by round."""
    if point.workers == 1:
        return [1.0]
    batch, micro_batches = base.global_batch, base.micro_batches
    limit = Point("limit", point.workers, batch, micro_batches)
    return ratios(runs, limit, Point("strong", 1, batch, micro_batches))


def draws(rounds: Sequence[int], count: int) -> list[list[int]]:
    """Return `count` resamples of the rounds, each to be used for all points."""
    generator = np.random.default_rng(0)
    return [generator.choice(rounds, len(rounds)).tolist() for _ in range(count)]
