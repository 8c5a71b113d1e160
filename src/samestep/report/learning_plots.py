"""What was learnt, and how fast: figures over the steps and epochs of a run."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.document.formatting import Value, count, number, plain_name, score
from samestep.output.schema import Epoch, Step, measured


Curve = list[tuple[float, float]]
MOST_POINTS = 300
"""More cannot be seen in a column of a page."""


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """Means of neighbours, so that at most `most` points are left."""
    bin_size = math.ceil(len(curve) / most) or 1
    bins = [curve[at : at + bin_size] for at in range(0, len(curve), bin_size)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in bins]


def over_steps(steps: Sequence[Step], read: Callable[[Step], Value]) -> Curve:
    """(step, value) where the value is finite."""
    return _finite([(step.step, read(step)) for step in steps])


def over_epochs(
    epochs: Sequence[Epoch], steps: Sequence[Step], read: Callable[[Epoch], Value]
) -> Curve:
    """(last step of the epoch, value) where the value is finite."""
    ends = _ends(steps)
    return _finite(
        [(ends.get(epoch.epoch, epoch.epoch), read(epoch)) for epoch in epochs]
    )


def learning_plot(
    what: str, steps: Sequence[Step], epochs: Sequence[Epoch]
) -> Plot | None:
    """Training and validation loss or a metric; None where there is neither."""
    of_steps = over_steps(steps, lambda step: measured(step, what))
    train = over_epochs(epochs, steps, lambda epoch: measured(epoch, f"train_{what}"))
    held_out = over_epochs(
        epochs, steps, lambda epoch: measured(epoch, f"validation_{what}")
    )
    if not (of_steps or train or held_out):
        return None
    figure, axes = plot_style.figure()
    colour, other = plot_style.SERIES[:2]
    axes.plot(*_xy(thin(of_steps)), color=colour, alpha=0.45, linewidth=1)
    axes.plot(*_xy(train), color=colour, marker="o", label="training")
    if held_out:
        axes.plot(*_xy(held_out), color=other, marker="s", label="validation")
    name_axes(axes, plain_name(what))
    if what == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    last = (held_out or train or of_steps)[-1][1]
    split = "Validation" if held_out else "Training"
    title = plain_name(what)
    return Plot(
        what if what in ("loss", "accuracy") else f"metric-{what}",
        title.capitalize(),
        f"{title.capitalize()} over {count(len(steps))} recorded steps; "
        f"{split.lower()} {title} ends at {score(what, last)}.",
        figure,
        "Thin line: means of a few steps. Points: of whole epochs.",
    )


def rate_plot(steps: Sequence[Step]) -> Plot | None:
    """The learning rate."""
    curve = over_steps(steps, lambda step: step.lr)
    if not curve:
        return None
    figure, axes = plot_style.figure()
    axes.plot(*_xy(thin(curve)), color=plot_style.SERIES[0])
    from_zero(axes)
    name_axes(axes, "learning rate")
    highest = max(y for _, y in curve)
    return Plot(
        "learning-rate",
        "Learning rate",
        f"The learning rate over the steps; its highest value is {highest:.3g}.",
        figure,
    )


def throughput_plot(steps: Sequence[Step]) -> Plot | None:
    """Samples per second."""
    curve = over_steps(steps, lambda step: step.samples_per_second)
    if not curve:
        return None
    figure, axes = plot_style.figure()
    axes.plot(*_xy(thin(curve)), color=plot_style.SERIES[0])
    from_zero(axes)
    name_axes(axes, "samples per second")
    axes.yaxis.set_major_formatter(thousands())
    mean = fmean(y for _, y in curve)
    return Plot(
        "throughput",
        "Throughput",
        f"Samples per second over the steps, {count(mean)} on average.",
        figure,
    )


def noise_plot(steps: Sequence[Step], epochs: Sequence[Epoch]) -> Plot | None:
    """The gradient noise scale, in samples."""
    curve = over_steps(steps, lambda step: step.noise_scale) or over_epochs(
        epochs, steps, lambda epoch: epoch.noise_scale
    )
    curve = [(x, y) for x, y in curve if y > 0]
    if len(curve) < 2:
        return None
    figure, axes = plot_style.figure()
    axes.plot(*_xy(thin(curve)), color=plot_style.SERIES[2])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_log_ticks(curve_span(curve)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    name_axes(axes, "samples")
    return Plot(
        "noise-scale",
        "Gradient noise scale",
        f"The noise scale over the steps; it ends at {count(curve[-1][1])} samples.",
        figure,
        "The global batch above which more samples per step help little.",
    )


def _log_ticks(span: float) -> Locator:
    """Few enough to be labelled, and at least two."""
    if span < 8:
        return MaxNLocator(4)
    return LogLocator(subs=(1, 2, 5) if span < 200 else (1,))


def curve_span(curve: Sequence[tuple[float, float]]) -> float:
    """The largest value by the smallest; values are positive."""
    values = [y for _, y in curve]
    return max(values) / min(values)


def share_plot(steps: Sequence[Step]) -> Plot | None:
    """Which share of all workers' time went into talking, and into waiting."""
    curves = {
        "exchange and wait": over_steps(steps, lambda step: step.communication_share),
        "wait only": over_steps(steps, lambda step: step.straggler_share),
    }
    if not any(curves.values()) or all(len(step.workers) < 2 for step in steps):
        return None
    figure, axes = plot_style.figure()
    colours = (plot_style.PHASES["exchange"], plot_style.PHASES["wait"])
    for (label, curve), colour in zip(curves.items(), colours, strict=True):
        axes.plot(*_xy(thin(curve)), color=colour, label=label)
    from_zero(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    name_axes(axes, "share of time")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return Plot(
        "communication",
        "Communication and stragglers",
        "The share of the workers' time spent in exchange and wait, and in wait alone.",
        figure,
    )


def from_zero(axes: Axes) -> None:
    """Heights can be compared; the highest has air above it."""
    top = axes.dataLim.ymax * 1.06
    axes.set_ylim(0, top if top > 0 else 1)


def thousands() -> FuncFormatter:
    """`26,000` on an axis."""
    return FuncFormatter(lambda value, _: number(value, ",.6g"))


def name_axes(axes: Axes, name: str, below: str = "step") -> None:
    """What is shown upwards, and what to the right."""
    axes.set_title(name)
    axes.set_xlabel(below)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(thousands())
    axes.grid(visible=False, axis="x")


def _ends(steps: Sequence[Step]) -> dict[int, int]:
    """epoch -> its last recorded step."""
    return {step.epoch: step.step for step in steps}


def _finite(curve: Sequence[tuple[float, Value]]) -> Curve:
    return [(x, y) for x, y in curve if y is not None and math.isfinite(y)]


def _xy(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]
