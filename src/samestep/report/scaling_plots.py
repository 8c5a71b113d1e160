"""Figures of speed-up, efficiency, phases and predictions."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.output.schema import Point, Prediction, Scaling
from samestep.report import time_plots
from samestep.report.learning_plots import finite, xy
from samestep.report.time_plots import total


MARKERS = "osD^vP"
MAX_BATCHES = 6
"""Lines in one figure; more cannot be distinguished."""
Series = list[tuple[str, list[Point]]]


def series(points: Sequence[Point], kind: str) -> Series:
    """Group points that have a speed-up by global batch, with workers ascending."""
    of_kind = [p for p in points if p.kind == kind and fmt.is_finite(p.speedup)]
    grouped: dict[str, list[Point]] = {}
    for point in sorted(of_kind, key=lambda p: (p.global_batch, p.workers)):
        # In weak scaling the global batch grows with the workers: one group for all.
        name = f"batch {point.global_batch:,}" if kind == "strong" else "weak scaling"
        grouped.setdefault(name, []).append(point)
    return list(grouped.items())


def speedup_plot(grouped: Series, kind: str) -> Plot | None:
    """Draw measured speed-up with intervals, the ideal and the machine's limit."""
    if not grouped:
        return None
    most = max(point.workers for _, points in grouped for point in points)
    figure, axes = _speedup_figure(most)
    first_name, first = grouped[0]
    limit = finite((point.workers, point.limit_speedup) for point in first)
    if limit:
        label = f"limit, {first_name}" if len(grouped) > 1 else "limit"
        axes.plot(*xy(limit), color=plot_style.INK, ls="--", lw=1.1, label=label)
    for at, (name, points) in enumerate(grouped[:MAX_BATCHES]):
        _draw_measured(axes, at, name, points)
    axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    best = max((p for _, ps in grouped for p in ps), key=lambda p: p.speedup or 0)
    return Plot(
        f"speedup-{kind}",
        f"Speed-up, {kind} scaling",
        f"Speed-up by number of workers. The largest is {fmt.times(best.speedup)} with "
        f"{fmt.plural(best.workers, 'worker')}; the table has the numbers.",
        figure,
        "Bars: 95% intervals. Limit: independent trainings that never communicate.",
    )


def efficiency_plot(grouped: Series, kind: str) -> Plot | None:
    """Draw speed-up per worker, and as a share of the machine's limit."""
    if not grouped:
        return None
    figure, axes = plot_style.figure(height=3.2)
    axes.axhline(1, color=plot_style.MUTED, linestyle=":")
    for at, (name, points) in enumerate(grouped[:MAX_BATCHES]):
        look: dict[str, Any] = {"color": plot_style.SERIES[at], "marker": MARKERS[at]}
        linear = finite((p.workers, p.efficiency) for p in points)
        axes.plot(*xy(linear), label=name, **look)
        limit = finite((p.workers, p.efficiency_of_limit) for p in points)
        axes.plot(*xy(limit), mfc="none", ls="--", **look)
    plot_style.name_axes(axes, "efficiency", "workers")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    last = grouped[0][1][-1]
    return Plot(
        f"efficiency-{kind}",
        f"Efficiency, {kind} scaling",
        f"Speed-up per worker: {fmt.percent(last.efficiency)} with "
        f"{fmt.plural(last.workers, 'worker')}; the table has the numbers.",
        figure,
        "Solid: share of linear speed-up. Dashed: share of the machine's limit.",
    )


def phases_plot(name: str, points: Sequence[Point], number: int) -> Plot | None:
    """Draw milliseconds of a step by phase, a bar for each number of workers."""
    parts = [total([point.seconds_by_phase]) for point in points]
    if not any(parts):
        return None
    figure, axes = time_plots.bars(len(points))
    milliseconds = [{k: 1e3 * v for k, v in part.items()} for part in parts]
    time_plots.stack(axes, range(len(points)), milliseconds, horizontal=True)
    axes.set_yticks(range(len(points)), [str(point.workers) for point in points])
    axes.set_title("workers")
    axes.set_xlabel("milliseconds of a step")
    plot_style.legend_below(figure, axes)
    return Plot(
        f"phases-{number}",
        f"A step by phase, {name}",
        f"Phases of a step with {fmt.plural(points[-1].workers, 'worker')} and fewer; "
        "the table of phases has the numbers.",
        figure,
        "Mean over the workers and rounds.",
    )


def prediction_plot(scaling: Scaling, where: str) -> Plot | None:
    """Draw predicted speed-up with bands; `where` is `machine` or `nodes`."""
    shown = [
        p for p in scaling.predictions if p.where == where and fmt.is_finite(p.speedup)
    ]
    if not shown:
        return None
    most = max(p.workers for p in shown)
    figure, axes = _speedup_figure(most)
    for at, batch in enumerate(sorted({p.global_batch for p in shown})[:MAX_BATCHES]):
        chosen = [p for p in shown if p.global_batch == batch]
        _draw_predicted(axes, at, sorted(chosen, key=lambda p: p.workers))
    if most > 8:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    plot_style.legend_below(figure, axes)
    place = "on this machine" if where == "machine" else "on several nodes"
    top = max(p.speedup or 0.0 for p in shown)
    return Plot(
        f"prediction-{where}",
        f"Predicted speed-up {place}",
        f"Predicted speed-up up to {fmt.plural(most, 'worker')}; at best "
        f"{fmt.times(top)}. The table of predictions has the numbers.",
        figure,
        "Bands: 95% intervals of the model.",
    )


def _speedup_figure(most: int) -> tuple[Figure, Axes]:
    """Return a figure of speed-up over up to `most` workers, with the ideal line."""
    figure, axes = plot_style.figure(height=3.2)
    ends = [1, most]
    axes.plot(ends, ends, color=plot_style.MUTED, linestyle=":", label="ideal")
    plot_style.name_axes(axes, "speed-up", "workers")
    return figure, axes


def _draw_measured(axes: Axes, at: int, name: str, points: list[Point]) -> None:
    ys = [point.speedup or 0.0 for point in points]
    below = [_gap(y, p.speedup_low) for y, p in zip(ys, points, strict=True)]
    above = [_gap(p.speedup_high, y) for y, p in zip(ys, points, strict=True)]
    axes.errorbar(
        [point.workers for point in points],
        ys,
        yerr=[below, above],
        capsize=3,
        elinewidth=1,
        color=plot_style.SERIES[at],
        marker=MARKERS[at],
        label=name,
    )


def _draw_predicted(axes: Axes, at: int, predictions: list[Prediction]) -> None:
    xs = [p.workers for p in predictions]
    colour = plot_style.SERIES[at]
    axes.plot(
        xs,
        [p.speedup or 0.0 for p in predictions],
        color=colour,
        marker=MARKERS[at] if len(predictions) <= 16 else None,
        label=f"batch {predictions[0].global_batch:,}",
    )
    lows = [_bound(p, p.low) for p in predictions]
    highs = [_bound(p, p.high) for p in predictions]
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0)


def _bound(prediction: Prediction, rate: fmt.Value) -> float:
    """Convert a bound in samples per second to one in speed-up."""
    middle, speedup = prediction.samples_per_second, prediction.speedup or 0.0
    if not fmt.is_finite(rate) or not fmt.is_finite(middle) or middle == 0:
        return speedup
    return speedup * rate / middle


def _gap(high: fmt.Value, low: fmt.Value) -> float:
    """Return the length of an error bar: 0 if an end is unknown."""
    return max(0.0, high - low) if fmt.is_finite(high) and fmt.is_finite(low) else 0.0
