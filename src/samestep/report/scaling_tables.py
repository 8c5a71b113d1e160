"""The tables of a scaling study's report."""

import re
from collections.abc import Sequence

from samestep.document import plot_style
from samestep.document.blocks import Block, Code, Row, Table, Text
from samestep.document.formatting import (
    Value,
    count,
    interval,
    percent,
    prefixed,
    seconds,
    significant,
    times,
)
from samestep.output.schema import HeldOut, Model, Point, Prediction
from samestep.report.time_plots import total


def speedup_table(name: str, points: Sequence[Point]) -> Table:
    """List expected and measured speed-up by number of workers."""
    columns: Row = ("workers", "expected", "measured", "95% interval", "efficiency")
    columns += ("machine limit", "of the limit", "samples/s", "step")
    rows = [
        (
            str(point.workers),
            times(float(point.workers)),
            times(point.speedup),
            interval(point.speedup_low, point.speedup_high, ".2f"),
            percent(point.efficiency),
            times(point.limit_speedup),
            percent(point.efficiency_of_limit),
            count(point.samples_per_second),
            seconds(point.step_seconds),
        )
        for point in points
    ]
    return Table(f"Expected and measured speed-up, {name}", columns, rows)


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
            count(point.global_batch),
            seconds(point.step_seconds),
            *(seconds(part.get(name, 0.0)) for name in names),
        )
        for point, part in shown
    ]
    columns = ("scaling", "workers", "global batch", "step", *names)
    return Table("Time of a step by phase, mean over the workers", columns, rows)


def model_blocks(model: Model) -> list[Block]:
    """Show the formula, its parameters, and how well it fits."""
    rows = [
        (
            parameter.name,
            parameter.meaning,
            _amount(parameter.value, parameter.unit),
            f"{_amount(parameter.low, parameter.unit)} to "
            f"{_amount(parameter.high, parameter.unit)}",
        )
        for parameter in model.parameters
    ]
    columns = ("parameter", "meaning", "value", "95% interval")
    # Each named part of the formula on a line.
    formula = re.sub(r"[;,] (?=\w+ = )", "\n", model.formula)
    return [
        Code("Model of the time of a step", formula),
        Text(
            f"The model's error over the measured points is "
            f"{percent(model.median_error)} (median) and at most "
            f"{percent(model.max_error)}."
        ),
        Table("Parameters of the model", columns, rows, words=2),
    ]


def _amount(value: Value, unit: str) -> str:
    if unit == "s" or unit.startswith(("s/", "s ")):
        return prefixed(value, unit)
    return significant(value) + ("" if unit in ("", "1") else f" {unit}")


def held_out_table(held_out: HeldOut) -> Table:
    """Compare a prediction with the measurement that the model had not seen."""
    row = (
        str(held_out.workers),
        count(held_out.global_batch),
        count(held_out.predicted),
        count(held_out.measured),
        percent(held_out.error),
    )
    columns = ("workers", "global batch", "predicted", "measured", "error")
    caption = "Predicted from the other points, then compared: samples per second"
    return Table(caption, columns, [row])


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
    rows = [
        (
            str(p.workers),
            str(p.nodes),
            count(p.global_batch),
            count(p.samples_per_second),
            interval(p.low, p.high, ",.0f"),
            times(p.speedup),
            percent(p.efficiency),
            times(p.relative_time_to_loss),
        )
        for p in shown
    ]
    columns: Row = ("workers", "nodes", "global batch", "samples/s", "95% interval")
    columns += ("speed-up", "efficiency", "time to the same loss")
    return Table(caption, columns, rows)
