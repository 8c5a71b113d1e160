"""Figures of what was learnt, and how fast, over the steps and epochs of a run."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    Locator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.output.schema import Epoch, Evaluation, Step, measured


Curve = list[tuple[float, float]]
MAX_POINTS = 300
"""More points cannot be seen in a column of a page."""


def thin(curve: Curve) -> Curve:
    """Return means of neighbours, at most MAX_POINTS."""
    bin_size = math.ceil(len(curve) / MAX_POINTS) or 1
    bins = [curve[at : at + bin_size] for at in range(0, len(curve), bin_size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in bins]


def finite(points: Iterable[tuple[float, fmt.Value]]) -> Curve:
    """Return the points whose value is finite."""
    return [(x, y) for x, y in points if fmt.is_finite(y)]


def xy(curve: Curve) -> tuple[list[float], list[float]]:
    """Return the coordinates as matplotlib takes them."""
    return [x for x, _ in curve], [y for _, y in curve]


def _over_epochs(epochs: Sequence[Epoch], steps: Sequence[Step], name: str) -> Curve:
    """Return (last step of the epoch, value of a field)."""
    ends = {step.epoch: step.step for step in steps}
    return finite((ends.get(e.epoch, e.epoch), measured(e, name)) for e in epochs)


def learning_plot(
    name: str,
    steps: Sequence[Step],
    epochs: Sequence[Epoch],
    evaluations: Sequence[Evaluation] = (),
) -> Plot | None:
    """Draw the loss or a metric of training and validation, if there is either.

    The `evaluations` are those by steps, if these were asked for.
    """
    single = finite((step.step, measured(step, name)) for step in steps)
    train = _over_epochs(epochs, steps, f"train_{name}")
    held_out = _over_epochs(epochs, steps, f"validation_{name}")
    if evaluations:
        held_out = finite(
            (e.step, measured(e, f"validation_{name}")) for e in evaluations
        )
    if not (single or train or held_out):
        return None
    title = fmt.plain_name(name)
    points = "whole epochs, and evaluations" if evaluations else "whole epochs"
    has_points = bool(train or held_out)
    marker = None if has_points else "."
    figure, axes = _line_figure(single, title, alpha=0.45, linewidth=1, marker=marker)
    if train:
        axes.plot(*xy(train), color=plot_style.SERIES[0], marker="o", label="training")
    if held_out:
        colour = plot_style.SERIES[1]
        axes.plot(*xy(held_out), color=colour, marker="s", label="validation")
    if name == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if has_points:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    last = (held_out or train or single)[-1][1]
    split = "validation " if held_out else "training " if train else ""
    return Plot(
        name if name in ("loss", "accuracy") else f"metric-{name}",
        title.capitalize(),
        f"{title.capitalize()} over {fmt.count(len(steps))} recorded steps; "
        f"{split}{title} ends at {fmt.score(name, last)}.",
        figure,
        "Thin line: means of a few steps."
        + (f" Points: {points}." if has_points else ""),
    )


def rate_plot(steps: Sequence[Step]) -> Plot | None:
    """Draw the learning rate, if it was recorded."""
    curve = finite((step.step, step.lr) for step in steps)
    if not curve:
        return None
    figure, axes = _line_figure(curve, "learning rate")
    from_zero(axes)
    highest = max(y for _, y in curve)
    text = f"The learning rate over the steps; its highest value is {highest:.3g}."
    return Plot("learning-rate", "Learning rate", text, figure)


def throughput_plot(steps: Sequence[Step]) -> Plot | None:
    """Draw samples per second, if they were recorded."""
    curve = finite((step.step, step.samples_per_second) for step in steps)
    if not curve:
        return None
    figure, axes = _line_figure(curve, "samples per second")
    from_zero(axes)
    axes.yaxis.set_major_formatter(plot_style.thousands())
    mean = fmean(y for _, y in curve)
    text = f"Samples per second over the steps, {fmt.count(mean)} on average."
    return Plot("throughput", "Throughput", text, figure)


def noise_plot(steps: Sequence[Step], epochs: Sequence[Epoch]) -> Plot | None:
    """Draw the gradient noise scale in samples, if there are two values or more."""
    curve = finite((step.step, step.noise_scale) for step in steps)
    curve = curve or _over_epochs(epochs, steps, "noise_scale")
    curve = [(x, y) for x, y in curve if y > 0]
    if len(curve) < 2:
        return None
    figure, axes = _line_figure(curve, "samples", color=plot_style.SERIES[2])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_log_ticks([y for _, y in curve]))
    axes.yaxis.set_major_formatter(plot_style.thousands())
    axes.yaxis.set_minor_locator(NullLocator())
    return Plot(
        "noise-scale",
        "Gradient noise scale",
        "The noise scale over the steps; it ends at "
        f"{fmt.count(curve[-1][1])} samples.",
        figure,
        "Above a global batch of this size, more samples per step help little.",
    )


def _log_ticks(values: Sequence[float]) -> Locator:
    """Return ticks for positive values: few enough to be labelled, at least two."""
    span = max(values) / min(values)
    if span < 8:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5) if span < 200 else (1,))


def share_plot(steps: Sequence[Step]) -> Plot | None:
    """Draw the share of all workers' time spent in communication and in waiting."""
    exchange = finite((step.step, step.communication_share) for step in steps)
    waiting = finite((step.step, step.straggler_share) for step in steps)
    if not (exchange or waiting) or all(len(step.workers) < 2 for step in steps):
        return None
    colours = plot_style.PHASES
    figure, axes = _line_figure(
        exchange, "share of time", color=colours["exchange"], label="exchange and wait"
    )
    if waiting:
        axes.plot(*xy(thin(waiting)), color=colours["wait"], label="wait only")
    from_zero(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    text = "The share of the workers' time in exchange and wait, and in wait alone."
    return Plot("communication", "Communication and stragglers", text, figure)


def _line_figure(
    curve: Curve, title: str, color: str = plot_style.SERIES[0], **line: Any
) -> tuple[Figure, Axes]:
    """Return a figure with one line over steps."""
    figure, axes = plot_style.figure()
    axes.plot(*xy(thin(curve)), color=color, **line)
    plot_style.name_axes(axes, title, "step", ticks=6)
    return figure, axes


def from_zero(axes: Axes) -> None:
    """Start the y axis at 0, so that heights can be compared, with air on top."""
    top = axes.dataLim.ymax * 1.06
    axes.set_ylim(0, top if top > 0 else 1)
