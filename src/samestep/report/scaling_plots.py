"""Speed-up, efficiency, phases and predictions as figures."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.document.formatting import Value, percent, plural, times
from samestep.output.schema import Amdahl, Point, Prediction, Scaling, Usl
from samestep.report import time_plots
from samestep.report.time_plots import total


MARKERS = "osD^vP"
DASHES = ("-", "--", "-.", ":")
MOST_BATCHES = 6
"""Lines in one figure; more cannot be told apart."""
Series = list[tuple[str, list[Point]]]


def series(points: Sequence[Point], kind: str) -> Series:
    """Points of a kind that have a speed-up, by global batch, workers ascending."""
    of_kind = [p for p in points if p.kind == kind and _ok(p.speedup)]
    exchanges = {point.exchange for point in of_kind}
    grouped: dict[str, list[Point]] = {}
    for point in sorted(of_kind, key=lambda p: (p.global_batch, p.exchange, p.workers)):
        # In weak scaling the global batch grows with the workers.
        batch = point.global_batch
        name = f"batch {batch:,}" if kind == "strong" else "weak scaling"
        if len(exchanges) > 1:
            name += f", {point.exchange}"
        grouped.setdefault(name, []).append(point)
    return list(grouped.items())


def speedup_plot(found: Series, kind: str) -> Plot | None:
    """Measured speed-up with intervals, against the ideal and the machine's limit."""
    if not found:
        return None
    figure, axes = plot_style.figure(height=3.2)
    most = max(point.workers for _, points in found for point in points)
    axes.plot(
        [1, most], [1, most], color=plot_style.MUTED, linestyle=":", label="ideal"
    )
    limits = sorted(
        {
            (point.workers, point.limit_speedup)
            for point in found[0][1]
            if point.limit_speedup is not None and _ok(point.limit_speedup)
        }
    )
    if limits:
        xs, ys = zip(*limits, strict=True)
        label = "limit"
        label += f", {plot_style.label(found[0][0])}" if len(found) > 1 else ""
        axes.plot(
            xs, ys, color=plot_style.INK, linestyle="--", linewidth=1.1, label=label
        )
    for at, (name, points) in enumerate(found[:MOST_BATCHES]):
        _measured(axes, at, name, points)
    _workers_axis(axes, "speed-up")
    axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    best = max((p for _, ps in found for p in ps), key=lambda p: p.speedup or 0)
    return Plot(
        f"speedup-{kind}",
        f"Speed-up, {kind} scaling",
        f"Speed-up by number of workers. The largest is {times(best.speedup)} with "
        f"{plural(best.workers, 'worker')}; the table has the numbers.",
        figure,
        "Bars: 95% intervals. Limit: independent workers that never talk.",
    )


def efficiency_plot(found: Series, kind: str) -> Plot | None:
    """Speed-up per worker, and as a share of the machine's limit."""
    if not found:
        return None
    figure, axes = plot_style.figure(height=3.2)
    axes.axhline(1, color=plot_style.MUTED, linestyle=":")
    for at, (name, points) in enumerate(found[:MOST_BATCHES]):
        colour, marker = plot_style.SERIES[at], MARKERS[at]
        own = [(p.workers, p.efficiency) for p in points]
        axes.plot(
            *_finite(own), color=colour, marker=marker, label=plot_style.label(name)
        )
        limit = [(p.workers, p.efficiency_of_limit) for p in points]
        axes.plot(*_finite(limit), color=colour, marker=marker, mfc="none", ls="--")
    _workers_axis(axes, "efficiency")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    last = found[0][1][-1]
    return Plot(
        f"efficiency-{kind}",
        f"Efficiency, {kind} scaling",
        f"Speed-up per worker: {percent(last.efficiency)} with "
        f"{plural(last.workers, 'worker')}; the table has the numbers.",
        figure,
        "Solid: of linear speed-up. Dashed: of what this machine allows.",
    )


def phases_plot(name: str, points: Sequence[Point], number: int) -> Plot | None:
    """Milliseconds of a step by phase, a bar for each number of workers."""
    parts = [total([point.seconds_by_phase]) for point in points]
    if not any(parts):
        return None
    figure, axes = time_plots.bars(len(points))
    milliseconds = [{k: 1e3 * v for k, v in part.items()} for part in parts]
    time_plots.stack(axes, range(len(points)), milliseconds, lying=True)
    axes.set_yticks(range(len(points)), [str(point.workers) for point in points])
    axes.set_title("workers")
    axes.set_xlabel("milliseconds of a step")
    plot_style.legend_below(figure, axes)
    return Plot(
        f"phases-{number}",
        f"A step by phase, {name}",
        f"Phases of a step with {plural(points[-1].workers, 'worker')} and fewer; the "
        "table of phases has the numbers.",
        figure,
        "Mean over the workers and rounds.",
    )


def prediction_plot(scaling: Scaling, where: str) -> Plot | None:
    """Predicted speed-up with bands; `where` is `machine` or `nodes`."""
    found = [p for p in scaling.predictions if p.where == where and _ok(p.speedup)]
    if not found:
        return None
    figure, axes = plot_style.figure(height=3.2)
    most = max(p.workers for p in found)
    axes.plot(
        [1, most], [1, most], color=plot_style.MUTED, linestyle=":", label="ideal"
    )
    for at, batch in enumerate(sorted({p.global_batch for p in found})[:MOST_BATCHES]):
        chosen = [p for p in found if p.global_batch == batch]
        _predicted(axes, at, sorted(chosen, key=lambda p: p.workers))
    top = max(p.speedup for p in found if p.speedup is not None)
    if where == "machine":
        _fits(axes, most, scaling.amdahl, scaling.usl)
    _workers_axis(axes, "speed-up")
    if most > 8:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    place = "on this machine" if where == "machine" else "on several nodes"
    return Plot(
        f"prediction-{where}",
        f"Predicted speed-up {place}",
        f"Predicted speed-up up to {plural(most, 'worker')}; at best {times(top)}. The "
        "table of predictions has the numbers.",
        figure,
        "Bands: 95% intervals of the model.",
    )


def _measured(axes: Axes, at: int, name: str, points: list[Point]) -> None:
    xs = [point.workers for point in points]
    ys = [point.speedup or 0.0 for point in points]
    below = [_gap(y, p.speedup_low) for y, p in zip(ys, points, strict=True)]
    above = [_gap(p.speedup_high, y) for y, p in zip(ys, points, strict=True)]
    axes.errorbar(
        xs,
        ys,
        yerr=[below, above],
        capsize=3,
        elinewidth=1,
        color=plot_style.SERIES[at],
        marker=MARKERS[at],
        label=plot_style.label(name),
    )


def _predicted(axes: Axes, at: int, found: list[Prediction]) -> None:
    xs = [p.workers for p in found]
    ys = [p.speedup or 0.0 for p in found]
    colour = plot_style.SERIES[at % len(plot_style.SERIES)]
    axes.plot(
        xs,
        ys,
        color=colour,
        marker=MARKERS[at] if len(found) <= 16 else None,
        label=f"batch {found[0].global_batch:,}",
    )
    bands = [_band(p) for p in found]
    lows, highs = [low for low, _ in bands], [high for _, high in bands]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _band(found: Prediction) -> tuple[float, float]:
    """The interval of samples per second as one of speed-up."""
    rate, speedup = found.samples_per_second, found.speedup or 0.0
    if rate is None or not _ok(rate) or not rate:
        return speedup, speedup
    low = found.low if found.low is not None and _ok(found.low) else rate
    high = found.high if found.high is not None and _ok(found.high) else rate
    return speedup * low / rate, speedup * high / rate


def _fits(axes: Axes, most: int, amdahl: Amdahl | None, usl: Usl | None) -> None:
    xs = [1 + (most - 1) * at / 60 for at in range(61)] if most > 1 else [1.0]
    if amdahl and amdahl.serial_fraction is not None and _ok(amdahl.serial_fraction):
        s = amdahl.serial_fraction
        ys = [_ratio(1, s + (1 - s) / x) for x in xs]
        axes.plot(xs, ys, color=plot_style.MUTED, lw=1, ls="--", label="Amdahl")
    if usl and usl.sigma is not None and usl.kappa is not None:
        a, b = usl.sigma, usl.kappa
        ys = [_ratio(x, 1 + a * (x - 1) + b * x * (x - 1)) for x in xs]
        axes.plot(xs, ys, color=plot_style.MUTED, lw=1, ls="-.", label="USL")


def _workers_axis(axes: Axes, name: str) -> None:
    axes.set_title(name)
    axes.set_xlabel("workers")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def _ratio(a: float, b: float) -> float:
    """NaN, which is not drawn, where a law has a pole."""
    return a / b if b > 0 else math.nan


def _ok(value: Value) -> bool:
    return value is not None and math.isfinite(value)


def _gap(high: Value, low: Value) -> float:
    """At least 0; 0 where an end is unknown."""
    if high is None or low is None or not math.isfinite(high - low):
        return 0.0
    return max(0.0, high - low)


def _finite(pairs: list[tuple[int, Value]]) -> tuple[list[int], list[float]]:
    kept = [(x, y) for x, y in pairs if y is not None and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]
