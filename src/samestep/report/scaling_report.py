"""The report of a scaling study: which blocks it has, in which order."""

import shlex
from pathlib import Path

from samestep.document import blocks as doc
from samestep.document import formatting as fmt
from samestep.output.schema import Scaling
from samestep.report import provenance, scaling_plots, scaling_tables
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
    blocks += [scaling_tables.speedup_table(name, points) for name, points in grouped]
    return doc.Section(f"{kind.capitalize()} scaling", kind, blocks)


def _phases(scaling: Scaling) -> doc.Section:
    grouped = scaling_plots.series(scaling.points, "strong")
    grouped += scaling_plots.series(scaling.points, "weak")
    plots = [
        scaling_plots.phases_plot(name, points, number)
        for number, (name, points) in enumerate(grouped[: scaling_plots.MAX_BATCHES])
    ]
    blocks = doc.side_by_side(plots)
    if blocks:
        blocks.append(scaling_tables.phases_table(scaling.points))
    return doc.Section("Phases", "phases-of-a-step", blocks)


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
        blocks += scaling_tables.model_blocks(scaling.model)
    if scaling.held_out:
        blocks.append(scaling_tables.held_out_table(scaling.held_out))
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
            blocks.append(scaling_tables.predictions_table(caption, predictions))
    return doc.Section("Predictions", "predictions", blocks)


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
