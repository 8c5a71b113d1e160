"""The tables of a scaling study's report."""

import re
from collections.abc import Sequence

from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.document.blocks import Block, Code, Table, Text, table
from samestep.output.schema import HeldOut, Model, Point, Prediction
from samestep.report.time_plots import total


def speedup_table(name: str, points: Sequence[Point]) -> Table:
    """List expected and measured speed-up by number of workers."""
    return table(
        f"Expected and measured speed-up, {name}",
        points,
        {
            "workers": lambda p: str(p.workers),
            "expected": lambda p: fmt.times(p.workers),
            "measured": lambda p: fmt.times(p.speedup),
            "95% interval": lambda p: fmt.interval(
                p.speedup_low, p.speedup_high, ".2f"
            ),
            "efficiency": lambda p: fmt.percent(p.efficiency),
            "machine limit": lambda p: fmt.times(p.limit_speedup),
            "of the limit": lambda p: fmt.percent(p.efficiency_of_limit),
            "samples/s": lambda p: fmt.count(p.samples_per_second),
            "step": lambda p: fmt.seconds(p.step_seconds),
        },
    )


def phases_table(points: Sequence[Point]) -> Table:
    """List the time of a step by phase."""
    shown = [(p, total([p.seconds_by_phase])) for p in points if p.kind != "limit"]
    names = [
        name for name in plot_style.PHASES if any(name in part for _, part in shown)
    ]
    rows = [
        (
            point.kind,
            str(point.workers),
            fmt.count(point.global_batch),
            fmt.seconds(point.step_seconds),
            *(fmt.seconds(part.get(name, 0.0)) for name in names),
        )
        for point, part in shown
    ]
    columns = ("scaling", "workers", "global batch", "step", *names)
    return Table("Time of a step by phase, mean over the workers", columns, rows)


def model_blocks(model: Model) -> list[Block]:
    """Show the formula, its parameters, and how well it fits."""
    parameters = table(
        "Parameters of the model",
        model.parameters,
        {
            "parameter": lambda p: p.name,
            "meaning": lambda p: p.meaning,
            "value": lambda p: _amount(p.value, p.unit),
            "95% interval": lambda p: (
                f"{_amount(p.low, p.unit)} to {_amount(p.high, p.unit)}"
            ),
        },
        words=2,
    )
    # Each named part of the formula on a line.
    formula = re.sub(r"[;,] (?=\w+ = )", "\n", model.formula)
    text = (
        f"The model's error over the measured points is "
        f"{fmt.percent(model.median_error)} (median) and at most "
        f"{fmt.percent(model.max_error)}."
    )
    return [Code("Model of the time of a step", formula), Text(text), parameters]


def _amount(value: fmt.Value, unit: str) -> str:
    if unit == "s" or unit.startswith(("s/", "s ")):
        return fmt.prefixed(value, unit)
    return fmt.significant(value) + ("" if unit in ("", "1") else f" {unit}")


def held_out_table(held_out: HeldOut) -> Table:
    """Compare a prediction with the measurement that the model had not seen."""
    return table(
        "Predicted from the other points, then compared: samples per second",
        [held_out],
        {
            "workers": lambda h: str(h.workers),
            "global batch": lambda h: fmt.count(h.global_batch),
            "predicted": lambda h: fmt.count(h.predicted),
            "measured": lambda h: fmt.count(h.measured),
            "error": lambda h: fmt.percent(h.error),
        },
    )


def predictions_table(caption: str, predictions: Sequence[Prediction]) -> Table:
    """List predicted speeds; of many nodes, the powers of two and the last."""
    most = max(p.nodes for p in predictions)
    shown = [
        p
        for p in predictions
        if p.nodes <= 8 or p.nodes.bit_count() == 1 or p.nodes == most
    ]
    if len(shown) < len(predictions):
        caption += " (some of them; all are in scaling.json)"
    return table(
        caption,
        shown,
        {
            "workers": lambda p: str(p.workers),
            "nodes": lambda p: str(p.nodes),
            "global batch": lambda p: fmt.count(p.global_batch),
            "samples/s": lambda p: fmt.count(p.samples_per_second),
            "95% interval": lambda p: fmt.interval(p.low, p.high, ",.0f"),
            "speed-up": lambda p: fmt.times(p.speedup),
            "efficiency": lambda p: fmt.percent(p.efficiency),
            "time to the same loss": lambda p: fmt.times(p.relative_time_to_loss),
        },
    )
