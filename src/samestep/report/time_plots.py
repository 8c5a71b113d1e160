"""Figures of where the time went: phases, workers and events."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.output.schema import Epoch, Event, Phases


MAX_BARS = 64
MAX_MARKS = 500


def total(parts: Sequence[Phases]) -> Phases:
    """Return the sums by phase, in the order of the figures.

    A phase that is not known counts as `other`.
    """
    sums = dict.fromkeys(plot_style.PHASES, 0.0)
    for part in parts:
        for name, value in part.items():
            known = name if name in sums else "other"
            sums[known] += value if math.isfinite(value) else 0
    return {name: value for name, value in sums.items() if value > 0}


def by_worker(epochs: Sequence[Epoch]) -> list[Phases]:
    """Return seconds by phase of each rank, over all epochs."""
    ranks = max((len(epoch.workers) for epoch in epochs), default=0)
    return [
        total([epoch.workers[rank] for epoch in epochs if rank < len(epoch.workers)])
        for rank in range(ranks)
    ]


def epoch_plot(epochs: Sequence[Epoch]) -> Plot | None:
    """Draw a bar for each epoch, divided into phases."""
    shown = [epoch for epoch in epochs if epoch.seconds_by_phase][-MAX_BARS:]
    if not shown:
        return None
    figure, axes = plot_style.figure()
    phases = [total([epoch.seconds_by_phase]) for epoch in shown]
    stack(axes, [epoch.epoch for epoch in shown], phases)
    plot_style.name_axes(axes, "seconds", "epoch")
    plot_style.legend_below(figure, axes)
    mean = sum(epoch.seconds or 0 for epoch in shown) / len(shown)
    note = "Mean over the workers."
    if len(shown) < len(epochs):
        note += f" The last {len(shown)} of {len(epochs):,} epochs."
    text = (
        f"Time of {fmt.plural(len(shown), 'epoch')}, {fmt.seconds(mean)} on average, "
        "divided into phases."
    )
    return Plot("epochs", "Epoch times by phase", text, figure, note)


def worker_plot(workers: Sequence[Phases]) -> Plot | None:
    """Draw a bar for each worker, divided into phases."""
    if not any(workers):
        return None
    shown = list(workers[:MAX_BARS])
    figure, axes = bars(len(shown))
    stack(axes, range(len(shown)), shown, horizontal=True)
    axes.set_xlabel("seconds")
    plot_style.legend_below(figure, axes)
    return Plot(
        "workers",
        "Phases of each worker",
        f"Time of {fmt.plural(len(workers), 'worker')} over all epochs, divided into "
        "phases; the table of workers has the numbers.",
        figure,
        "All epochs together, without evaluation.",
    )


def waiting_plot(waited_for: Sequence[float]) -> Plot | None:
    """Draw how long the others waited for each worker."""
    shown = [value if math.isfinite(value) else 0.0 for value in waited_for[:MAX_BARS]]
    if len(shown) < 2:
        return None
    figure, axes = bars(len(shown))
    axes.barh(range(len(shown)), shown, height=0.62, color=plot_style.PHASES["wait"])
    axes.set_xlabel("seconds")
    latest = max(range(len(shown)), key=lambda rank: shown[rank])
    return Plot(
        "waited-for",
        "Time that others waited for a worker",
        f"The others waited longest for worker {latest}: {fmt.seconds(shown[latest])}.",
        figure,
        "Mean over the other workers, all epochs together.",
    )


class Lane(NamedTuple):
    """The look of one kind of event on the time line."""

    label: str
    marker: str
    colour: str


LANES = {
    "epoch": Lane("epoch ends", "|", plot_style.SERIES[0]),
    "checkpoint": Lane("checkpoint", "|", plot_style.SERIES[2]),
    "rebalanced": Lane("rebalanced", "D", plot_style.SERIES[3]),
    "evicted": Lane("worker evicted", "v", plot_style.SERIES[5]),
    "fault": Lane("fault injected", "x", plot_style.SERIES[5]),
    "checkpoint failed": Lane("checkpoint failed", "x", plot_style.SERIES[1]),
    "failed": Lane("failure", "X", plot_style.PHASES["wait"]),
    "restart": Lane("restart", "o", plot_style.SERIES[1]),
    "resumed": Lane("resumed", ">", plot_style.SERIES[0]),
}
"""Kind of event -> its lane, from the top."""


def on_one_clock(events: Sequence[Event]) -> list[tuple[float, Event]]:
    """Pair each event with the seconds of work before it, without pauses."""
    placed: list[tuple[float, Event]] = []
    base = latest = 0.0
    for event in events:
        if event.event == "resumed":
            base = latest
        if math.isfinite(event.seconds):
            latest = base + event.seconds
            placed.append((latest, event))
    return placed


def time_line(events: Sequence[Event]) -> Plot | None:
    """Draw all events, in a lane for each kind that occurred."""
    placed = on_one_clock(events)
    times = {
        lane: [at for at, event in placed if event.event == kind]
        for kind, lane in LANES.items()
    }
    lanes = {lane: marks for lane, marks in times.items() if marks}
    if not lanes:
        return None
    figure, axes = plot_style.figure(plot_style.WIDE, 0.75 + 0.27 * len(lanes))
    for row, (lane, marks) in enumerate(lanes.items()):
        shown = marks[:: math.ceil(len(marks) / MAX_MARKS)]
        axes.plot(
            shown,
            [row] * len(shown),
            lane.marker,
            color=lane.colour,
            markersize=9 if lane.marker == "|" else 6,
            markeredgewidth=1.6,
        )
    axes.set_yticks(range(len(lanes)), [lane.label for lane in lanes])
    axes.tick_params(axis="y", labelcolor=plot_style.INK)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, placed[-1][0] * 1.01 or 1)
    axes.set_xlabel("seconds since the command began")
    counts = ", ".join(
        f"{lane.label} {len(marks)} times" for lane, marks in lanes.items()
    )
    text = f"Events over time: {counts}."
    return Plot("time-line", "Time line", text, figure, is_wide=True)


def bars(amount: int) -> tuple[Figure, Axes]:
    """Return a figure with room for horizontal bars, one below the other."""
    figure, axes = plot_style.figure(height=max(plot_style.HEIGHT, 0.9 + 0.2 * amount))
    axes.set_title("worker")
    axes.grid(visible=False, axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    axes.set_ylim(amount - 0.4, -0.6)
    return figure, axes


def stack(
    axes: Axes,
    at: Sequence[int],
    phases: Sequence[Mapping[str, float]],
    *,
    horizontal: bool = False,
) -> None:
    """Draw a bar at each place, divided into phases."""
    base = [0.0] * len(phases)
    for name in (n for n in plot_style.PHASES if any(n in part for part in phases)):
        values = [part.get(name, 0.0) for part in phases]
        colour = plot_style.PHASES[name]
        if horizontal:
            axes.barh(at, values, 0.62, left=base, color=colour, label=name)
        else:
            axes.bar(at, values, 0.72, bottom=base, color=colour, label=name)
        base = [low + value for low, value in zip(base, values, strict=True)]
