"""The report of a scaling study: which blocks it has, in which order."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from samestep.document import blocks as doc
from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.output.schema import HeldOut, Model, Point, Prediction, Scaling
from samestep.report import provenance, scaling_plots
from samestep.report.time_plots import total
from samestep.system.terminal import clean


# Networks are sold in bits per second.
FLAGS = {
    "workers": ("--workers", 1, ""),
    "global_batches": ("--global-batch", 1, ""),
    "exchange": ("--exchange", 1, ""),
    "rounds": ("--rounds", 1, ""),
    "seconds_per_run": ("--seconds", 1, ""),
    "nodes_up_to": ("--nodes-up-to", 1, ""),
    "bandwidth_bytes_per_second": ("--bandwidth", 8e-6, "Mbit"),
    "latency_seconds": ("--latency", 1e6, "us"),
}
"""Setting -> its flag, and the factor and unit of its value there."""


def scaling_document(scaling: Scaling, path: Path) -> doc.Document:
    """Return the report of the study at `path`; call it in `plot_style.style()`."""
    name = fmt.setting(scaling.recipe.get("name", "a recipe"))
    sections = [
        _summary(scaling),
        _speedup(scaling, "strong"),
        _speedup(scaling, "weak"),
        _phases(scaling),
        _model(scaling),
        _predictions(scaling),
        _settings(scaling),
        provenance.machine_section(scaling.environment),
        _repeat(scaling),
    ]
    title = clean(f"How {name} scales")
    subtitle = clean(f"A scaling study with samestep, recorded in {path}")
    return doc.Document(title, subtitle, scaling.status, _notices(scaling), sections)


def _notices(scaling: Scaling) -> list[str]:
    if scaling.status == "finished":
        return []
    done = fmt.plural(len(scaling.points), "point")
    return [
        f"These measurements have not finished: {done} so far. The same `samestep "
        "scale` command continues them."
    ]


def _summary(scaling: Scaling) -> doc.Section:
    grouped = scaling_plots.series(scaling.points, "strong")
    blocks = doc.key_figures([*_measured(grouped), *_predicted(scaling)])
    if scaling.advice:
        blocks.append(doc.Points(scaling.advice))
    if not grouped:
        blocks.append(doc.Text("No speed-up has been measured yet."))
    return doc.Section("Summary", "summary", blocks)


def _measured(grouped: scaling_plots.Series) -> list[doc.Fact | None]:
    """Return the numbers of the most workers at the first global batch."""
    if not grouped:
        return []
    name, (*_, last) = grouped[0]
    workers, of_limit = fmt.plural(last.workers, "worker"), last.efficiency_of_limit
    independent = "trainings without communication"
    return [
        doc.Fact("Speed-up", fmt.times(last.speedup), f"{workers}, {name}"),
        doc.Fact("Efficiency", fmt.percent(last.efficiency), "of linear speed-up"),
        doc.fact("Share of the machine's limit", of_limit, fmt.percent, independent),
        doc.Fact("Samples per second", fmt.count(last.samples_per_second), workers),
    ]


def _predicted(scaling: Scaling) -> list[doc.Fact]:
    """Return the model's error and the noise scale."""
    facts = []
    if scaling.held_out:
        error = fmt.percent(scaling.held_out.error)
        workers = fmt.plural(scaling.held_out.workers, "worker")
        facts.append(doc.Fact("Prediction error", error, f"{workers}, held out"))
    if scaling.noise:
        batch = fmt.count(scaling.noise.critical_batch)
        facts.append(doc.Fact("Critical batch", batch, "samples"))
    return facts


def _speedup(scaling: Scaling, kind: str) -> doc.Section:
    grouped = scaling_plots.series(scaling.points, kind)
    plots = [
        scaling_plots.speedup_plot(grouped, kind),
        scaling_plots.efficiency_plot(grouped, kind),
    ]
    blocks = doc.side_by_side(plots)
    blocks += [_speedup_table(name, points) for name, points in grouped]
    return doc.Section(f"{kind.capitalize()} scaling", kind, blocks)


def _speedup_table(name: str, points: Sequence[Point]) -> doc.Table:
    """List expected and measured speed-up by number of workers."""
    return doc.table(
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


def _phases(scaling: Scaling) -> doc.Section:
    grouped = scaling_plots.series(scaling.points, "strong")
    grouped += scaling_plots.series(scaling.points, "weak")
    plots = [
        scaling_plots.phases_plot(name, points, number)
        for number, (name, points) in enumerate(grouped[: scaling_plots.MAX_BATCHES])
    ]
    blocks = doc.side_by_side(plots)
    if blocks:
        blocks.append(_phases_table(scaling.points))
    return doc.Section("Phases", "phases-of-a-step", blocks)


def _phases_table(points: Sequence[Point]) -> doc.Table:
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
    return doc.Table("Time of a step by phase, mean over the workers", columns, rows)


def _model(scaling: Scaling) -> doc.Section:
    blocks: list[doc.Block] = []
    if scaling.no_fit_because:
        blocks.append(doc.Text(f"No model was fitted: {scaling.no_fit_because}"))
    elif scaling.model is None:
        text = (
            "No model was fitted: it takes at least two measured numbers of workers, "
            "such as `--workers 1,2`."
        )
        blocks.append(doc.Text(text))
    if scaling.model:
        blocks += _model_blocks(scaling.model)
    if scaling.held_out:
        blocks.append(_held_out_table(scaling.held_out))
    if scaling.noise:
        at = fmt.count(scaling.noise.at_global_batch)
        text = (
            f"The gradient noise scale, measured at global batch {at}, is "
            f"{fmt.count(scaling.noise.noise_scale)} samples; the critical batch size "
            f"is {fmt.count(scaling.noise.critical_batch)}: far above it, a larger "
            "global batch saves hardly any steps."
        )
        blocks.append(doc.Text(text))
    return doc.Section("Model", "model", blocks)


def _model_blocks(model: Model) -> list[doc.Block]:
    """Show the formula, its parameters, and how well it fits."""
    parameters = doc.table(
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
    return [
        doc.Code("Model of the time of a step", formula),
        doc.Text(text),
        parameters,
    ]


def _amount(value: fmt.Value, unit: str) -> str:
    if unit == "s" or unit.startswith(("s/", "s ")):
        return fmt.prefixed(value, unit)
    return fmt.significant(value) + ("" if unit in ("", "1") else f" {unit}")


def _held_out_table(held_out: HeldOut) -> doc.Table:
    """Compare a prediction with the measurement that the model had not seen."""
    return doc.table(
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


def _predictions(scaling: Scaling) -> doc.Section:
    captions = {
        "machine": "Predictions for this machine",
        "nodes": "Predictions for several nodes",
    }
    plots = [scaling_plots.prediction_plot(scaling, where) for where in captions]
    blocks = doc.side_by_side(plots)
    for where, caption in captions.items():
        predictions = [p for p in scaling.predictions if p.where == where]
        if predictions:
            blocks.append(predictions_table(caption, predictions))
    return doc.Section("Predictions", "predictions", blocks)


def predictions_table(caption: str, predictions: Sequence[Prediction]) -> doc.Table:
    """List predicted speeds; of many nodes, the powers of two and the last."""
    most = max(p.nodes for p in predictions)
    shown = [
        p
        for p in predictions
        if p.nodes <= 8 or p.nodes.bit_count() == 1 or p.nodes == most
    ]
    if len(shown) < len(predictions):
        caption += " (some of them; all are in scaling.json)"
    return doc.table(
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


def _settings(scaling: Scaling) -> doc.Section:
    sheets = [provenance.settings_sheet("Recipe", scaling.recipe)]
    if scaling.settings:
        caption = "What was measured"
        sheets.insert(0, provenance.settings_sheet(caption, scaling.settings))
    return doc.Section("Settings and recipe", "recipe", [doc.Sheets(sheets)])


def _repeat(scaling: Scaling) -> doc.Section:
    command = shlex.join(["samestep", "scale", "recipe.toml", *_flags(scaling)])
    code = doc.Code("Measure it again, with the recipe below in recipe.toml", command)
    recipe = provenance.recipe_code(scaling.recipe)
    return doc.Section("How to repeat it", "repeat", [code, recipe])


def _flags(scaling: Scaling) -> list[str]:
    """Return the flags of `samestep scale` that give the same settings."""
    settings = scaling.settings
    flags = []
    for name, (flag, factor, unit) in FLAGS.items():
        value = settings.get(name)
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if unit and isinstance(value, (int, float)):
            value = f"{value * factor:.10g}"
        if value is not None:
            flags += [flag, f"{value}{unit}"]
    return [*flags, "--weak"] if settings.get("weak") else flags
