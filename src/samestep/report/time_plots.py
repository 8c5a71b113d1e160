"""Where the time went: figures of phases, workers and events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from samestep.document import plot_style
from samestep.document.blocks import Plot
from samestep.document.formatting import plural, seconds
from samestep.output.schema import Epoch, Event, Phases


MOST_BARS = 64
MOST_MARKS = 500


def total(parts: Sequence[Phases]) -> Phases:
    """Sums by phase, in the order in which figures show them.

    What is not a known phase counts as `other`.
    """
    sums = dict.fromkeys(plot_style.PHASES, 0.0)
    for part in parts:
        for name, value in part.items():
            sums[name if name in sums else "other"] += (
                value if math.isfinite(value) else 0
            )
    return {name: value for name, value in sums.items() if value > 0}


def by_worker(epochs: Sequence[Epoch]) -> list[Phases]:
    """Seconds by phase of each rank, over all epochs."""
    ranks = max((len(epoch.workers) for epoch in epochs), default=0)
    return [
        total([epoch.workers[rank] for epoch in epochs if rank < len(epoch.workers)])
        for rank in range(ranks)
    ]


def epoch_plot(epochs: Sequence[Epoch]) -> Plot | None:
    """A bar for each epoch, divided into phases."""
    shown = [epoch for epoch in epochs if epoch.seconds_by_phase][-MOST_BARS:]
    if not shown:
        return None
    figure, axes = plot_style.figure()
    stack(
        axes,
        [epoch.epoch for epoch in shown],
        [total([epoch.seconds_by_phase]) for epoch in shown],
    )
    axes.set_title("seconds")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    plot_style.legend_below(figure, axes)
    mean = sum(epoch.seconds or 0 for epoch in shown) / len(shown)
    note = "Mean over the workers."
    if len(shown) < len(epochs):
        note += f" The last {len(shown)} of {len(epochs):,} epochs."
    return Plot(
        "epochs",
        "Epoch times by phase",
        f"Time of {plural(len(shown), 'epoch')}, {seconds(mean)} on average, divided "
        "into phases.",
        figure,
        note,
    )


def worker_plot(workers: Sequence[Phases]) -> Plot | None:
    """A bar for each worker, divided into phases."""
    if not any(workers):
        return None
    shown = list(workers[:MOST_BARS])
    figure, axes = bars(len(shown))
    stack(axes, range(len(shown)), shown, lying=True)
    axes.set_xlabel("seconds")
    plot_style.legend_below(figure, axes)
    return Plot(
        "workers",
        "Phases of each worker",
        f"Time of {plural(len(workers), 'worker')} over all epochs, divided into "
        "phases; the table of workers has the numbers.",
        figure,
        "All epochs together; evaluation is not included.",
    )


def waiting_plot(waited_for: Sequence[float]) -> Plot | None:
    """For how long the others waited for each worker."""
    shown = [value if math.isfinite(value) else 0.0 for value in waited_for[:MOST_BARS]]
    if len(shown) < 2:
        return None
    figure, axes = bars(len(shown))
    axes.barh(range(len(shown)), shown, height=0.62, color=plot_style.PHASES["wait"])
    axes.set_xlabel("seconds")
    latest = max(range(len(shown)), key=lambda rank: shown[rank])
    return Plot(
        "waited-for",
        "Whom the others waited for",
        f"The others waited longest for worker {latest}: {seconds(shown[latest])}.",
        figure,
        "Mean over the other workers, all epochs together.",
    )


@dataclass(frozen=True)
class Lane:
    """Events of one kind on the time line."""

    label: str
    events: tuple[str, ...]
    marker: str
    colour: str


LANES = (
    Lane("epoch ends", ("epoch",), "|", plot_style.SERIES[0]),
    Lane("checkpoint", ("checkpoint",), "|", plot_style.SERIES[2]),
    Lane("rebalanced", ("rebalanced",), "D", plot_style.SERIES[3]),
    Lane("worker evicted", ("evicted",), "v", plot_style.SERIES[5]),
    Lane("fault injected", ("fault",), "x", plot_style.SERIES[5]),
    Lane("checkpoint failed", ("checkpoint failed",), "x", plot_style.SERIES[1]),
    Lane("failure", ("failed",), "X", plot_style.PHASES["wait"]),
    Lane("restart", ("restart",), "o", plot_style.SERIES[1]),
    Lane("resumed", ("resumed",), ">", plot_style.SERIES[0]),
)


def on_one_clock(events: Sequence[Event]) -> list[tuple[float, Event]]:
    """Seconds of work before each event: time between commands is left out."""
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
    """All events, a lane for each kind that occurred."""
    placed = on_one_clock(events)
    times = [
        (lane, [at for at, event in placed if event.event in lane.events])
        for lane in LANES
    ]
    lanes = [(lane, found) for lane, found in times if found]
    if not lanes:
        return None
    figure, axes = plot_style.figure(plot_style.WIDE, 0.75 + 0.27 * len(lanes))
    for row, (lane, found) in enumerate(lanes):
        shown = found[:: math.ceil(len(found) / MOST_MARKS)]
        axes.plot(
            shown,
            [row] * len(shown),
            lane.marker,
            color=lane.colour,
            markersize=9 if lane.marker == "|" else 6,
            markeredgewidth=1.6,
        )
    axes.set_yticks(range(len(lanes)), [lane.label for lane, _ in lanes])
    axes.tick_params(axis="y", labelcolor=plot_style.INK)
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    axes.set_xlim(0, placed[-1][0] * 1.01 or 1)
    axes.set_xlabel("seconds since the command began")
    counted = ", ".join(f"{lane.label} {len(found)} times" for lane, found in lanes)
    return Plot(
        "time-line", "Time line", f"Events over time: {counted}.", figure, is_wide=True
    )


def bars(amount: int) -> tuple[Figure, Axes]:
    """Room for lying bars, one below the other."""
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
    lying: bool = False,
) -> None:
    """A bar at each place, divided into phases."""
    base = [0.0] * len(phases)
    for name in (n for n in plot_style.PHASES if any(n in part for part in phases)):
        values = [part.get(name, 0.0) for part in phases]
        colour = plot_style.PHASES[name]
        if lying:
            axes.barh(at, values, 0.62, left=base, color=colour, label=name)
        else:
            axes.bar(at, values, 0.72, bottom=base, color=colour, label=name)
        base = [low + value for low, value in zip(base, values, strict=True)]
