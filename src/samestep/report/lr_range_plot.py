"""The figure of a learning-rate range test."""

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, LogLocator

from samestep.document import plot_style


def svg(
    rates: Sequence[float],
    losses: Sequence[float],
    smooth: Sequence[float],
    suggested: float | None,
) -> str:
    """Return an SVG file: the loss over the learning rate, and the suggested rate."""
    with plot_style.style():
        plot, axes = plot_style.figure(2 * plot_style.WIDTH, 1.5 * plot_style.HEIGHT)
        axes.plot(rates, losses, color=plot_style.PHASES["other"], label="loss")
        axes.plot(rates, smooth, color=plot_style.SERIES[0], label="smoothed")
        if suggested is not None:
            marked = f"suggested: {suggested:.3g}"
            axes.axvline(suggested, color=plot_style.SERIES[1], label=marked)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title("Loss of each step")
        axes.set_xlabel("learning rate")
        # What diverges would flatten everything else.
        low, high = min(*smooth, *losses), min(max(smooth), 2 * smooth[0])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        plot_style.legend_below(plot, axes)
        return plot_style.svg_file(plot, "lr-range")
