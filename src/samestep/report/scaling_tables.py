"""The tables of a scaling's report."""

import re
from collections.abc import Sequence

from samestep.document import plot_style
from samestep.document.blocks import Block, Code, Row, Table, Text
from samestep.document.formatting import (
    MISSING,
    Value,
    count,
    interval,
    number,
    percent,
    prefixed,
    seconds,
    significant,
    times,
)
from samestep.output.schema import Amdahl, HeldOut, Model, Point, Prediction, Usl
from samestep.report.time_plots import total


def course_table(name: str, points: Sequence[Point]) -> Table:
    """Expected and measured speed-up by number of workers."""
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
    """Time of a step by phase."""
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
    """The formula, its parameters, and how well it fits."""
    rows: list[Row] = [
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
    return [
        Code("Model of the time of a step", _lines(model.formula)),
        Text(
            f"The model's error over the measured points is "
            f"{percent(model.median_error)} (median), {percent(model.max_error)} at "
            "most."
        ),
        Table("Parameters of the model", columns, rows, words=2),
    ]


def _lines(formula: str) -> str:
    """Each part of it that has a name, on a line."""
    return re.sub(r"[;,] (?=\w+ = )", "\n", formula)


def _amount(value: Value, unit: str) -> str:
    if unit == "s" or unit.startswith(("s/", "s ")):
        return prefixed(value, unit)
    return significant(value) + ("" if unit in ("", "1") else f" {unit}")


def laws_table(amdahl: Amdahl | None, usl: Usl | None) -> Table:
    """Two laws fitted to the same points, for comparison."""
    rows: list[Row] = []
    if amdahl:
        between = f"{percent(amdahl.low)} to {percent(amdahl.high)}"
        fraction = percent(amdahl.serial_fraction)
        rows.append(("Amdahl", "serial fraction", fraction, between))
    if usl:
        rows.append(("USL", "contention (sigma)", number(usl.sigma, ".4g"), MISSING))
        rows.append(("USL", "coherence (kappa)", number(usl.kappa, ".4g"), MISSING))
        peak = "none" if usl.peak_workers is None else number(usl.peak_workers, ".1f")
        rows.append(("USL", "workers at the peak", peak, MISSING))
    columns = ("law", "parameter", "value", "95% interval")
    return Table("Amdahl's law and the universal scalability law", columns, rows, 2)


def held_out_table(found: HeldOut) -> Table:
    """The prediction that could be checked."""
    row = (
        str(found.workers),
        count(found.global_batch),
        count(found.predicted),
        count(found.measured),
        percent(found.error),
    )
    columns = ("workers", "global batch", "predicted", "measured", "error")
    caption = "Predicted from the other points, then compared: samples per second"
    return Table(caption, columns, [row])


def predictions_table(caption: str, found: Sequence[Prediction]) -> Table:
    """Predicted speed, with bands; of many nodes, the powers of two and the last."""
    most = max(p.nodes for p in found)
    shown = [p for p in found if p.nodes <= 8 or not p.nodes & (p.nodes - 1)]
    shown = [p for p in found if p in shown or p.nodes == most]
    if len(shown) < len(found):
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
