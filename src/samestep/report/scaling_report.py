"""The report of a scaling: which blocks it has, in which order."""

import shlex

from samestep.document.blocks import (
    Block,
    Code,
    Document,
    Fact,
    KeyFigures,
    Plots,
    Points,
    Section,
    Sheets,
    Text,
    together,
)
from samestep.document.formatting import count, percent, plural, setting, times
from samestep.output.schema import Scaling
from samestep.report import provenance, scaling_plots, scaling_tables
from samestep.report.embedded_data import plain
from samestep.report.load import ScalingFile
from samestep.system.terminal import clean


def scaling_document(file: ScalingFile) -> Document:
    """Figures are made here: call it in `ink.style()`."""
    scaling = file.scaling
    name = setting(scaling.recipe.get("name", "a recipe"))
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
    return Document(
        title=clean(f"How {name} scales"),
        subtitle=clean(f"A scaling with samestep, recorded in {file.path}"),
        status=scaling.status,
        notices=_notices(scaling),
        sections=[section for section in sections if section.blocks],
        data={"scaling": plain(scaling.model_dump(exclude_unset=True))},
    )


def _notices(scaling: Scaling) -> list[str]:
    if scaling.status == "finished":
        return []
    done = plural(len(scaling.points), "point")
    return [
        f"These measurements have not ended: {done} so far. The same `samestep scale` "
        "command goes on with them."
    ]


def _summary(scaling: Scaling) -> Section:
    blocks: list[Block] = []
    facts = _facts(scaling)
    if facts:
        blocks.append(KeyFigures(facts))
    if scaling.advice:
        blocks.append(Points(scaling.advice))
    if not scaling_plots.series(scaling.points, "strong"):
        blocks.append(Text("No speed-up has been measured yet."))
    return Section("Summary", "summary", blocks)


def _facts(scaling: Scaling) -> list[Fact]:
    """The most workers at the first global batch, the limit, the model's error."""
    facts = []
    found = scaling_plots.series(scaling.points, "strong")
    if found:
        name, points = found[0]
        best = points[-1]
        with_ = plural(best.workers, "worker")
        facts.append(Fact("Speed-up", times(best.speedup), f"{with_}, {name}"))
        facts.append(Fact("Efficiency", percent(best.efficiency), "of linear speed-up"))
        if best.efficiency_of_limit is not None:
            share = percent(best.efficiency_of_limit)
            facts.append(Fact("Of the machine's limit", share, "which never talks"))
        rate = count(best.samples_per_second)
        facts.append(Fact("Samples per second", rate, with_))
    if scaling.held_out:
        error = percent(scaling.held_out.error)
        workers = plural(scaling.held_out.workers, "worker")
        facts.append(Fact("Prediction error", error, f"{workers}, held out"))
    if scaling.noise:
        batch = count(scaling.noise.critical_batch)
        facts.append(Fact("Critical batch", batch, "samples"))
    return facts


def _speedup(scaling: Scaling, kind: str) -> Section:
    found = scaling_plots.series(scaling.points, kind)
    plots = [
        scaling_plots.speedup_plot(found, kind),
        scaling_plots.efficiency_plot(found, kind),
    ]
    blocks: list[Block] = []
    if found:
        blocks.append(Plots([plot for plot in plots if plot is not None]))
    blocks += [scaling_tables.course_table(name, points) for name, points in found]
    return Section(f"{kind.capitalize()} scaling", kind, blocks)


def _phases(scaling: Scaling) -> Section:
    found = [
        *scaling_plots.series(scaling.points, "strong"),
        *scaling_plots.series(scaling.points, "weak"),
    ]
    plots = [
        scaling_plots.phases_plot(name, points, number)
        for number, (name, points) in enumerate(found)
    ]
    blocks = together(plots[: scaling_plots.MOST_BATCHES])
    if blocks:
        blocks.append(scaling_tables.phases_table(scaling.points))
    return Section("Phases", "phases-of-a-step", blocks)


def _model(scaling: Scaling) -> Section:
    blocks: list[Block] = []
    if scaling.no_fit_because:
        blocks.append(Text(f"No model was fitted: {scaling.no_fit_because}"))
    elif scaling.model is None:
        blocks.append(
            Text(
                "No model was fitted: it takes at least two measured numbers of "
                "workers, such as `--workers 1,2`."
            )
        )
    if scaling.model:
        blocks += scaling_tables.model_blocks(scaling.model)
    if scaling.amdahl or scaling.usl:
        blocks.append(scaling_tables.laws_table(scaling.amdahl, scaling.usl))
    if scaling.held_out:
        blocks.append(scaling_tables.held_out_table(scaling.held_out))
    if scaling.noise:
        at = count(scaling.noise.at_global_batch)
        blocks.append(
            Text(
                f"The gradient noise scale, measured at global batch {at}, is "
                f"{count(scaling.noise.noise_scale)} samples; the critical batch size "
                f"is {count(scaling.noise.critical_batch)}: far above it, a larger "
                "global batch needs hardly fewer steps."
            )
        )
    return Section("Model", "model", blocks)


def _predictions(scaling: Scaling) -> Section:
    plots = [
        plot
        for where in ("machine", "nodes")
        if (plot := scaling_plots.prediction_plot(scaling, where)) is not None
    ]
    blocks: list[Block] = [Plots(plots)] if plots else []
    for where, caption in (
        ("machine", "Predictions for this machine"),
        ("nodes", "Predictions for several nodes"),
    ):
        found = [p for p in scaling.predictions if p.where == where]
        if found:
            blocks.append(scaling_tables.predictions_table(caption, found))
    return Section("Predictions", "predictions", blocks)


def _settings(scaling: Scaling) -> Section:
    sheets = [provenance.settings_sheet("Recipe", scaling.recipe)]
    if scaling.settings:
        caption = "What was measured"
        sheets.insert(0, provenance.settings_sheet(caption, scaling.settings))
    return Section("Settings and recipe", "recipe", [Sheets(sheets)])


def _repeat(scaling: Scaling) -> Section:
    command = shlex.join(["samestep", "scale", "recipe.toml", *_flags(scaling)])
    caption = "Measure it again, with the recipe below in recipe.toml"
    blocks: list[Block] = [
        Code(caption, command),
        provenance.recipe_code(scaling.recipe),
    ]
    return Section("How to repeat it", "repeat", blocks)


def _flags(scaling: Scaling) -> list[str]:
    """Of `samestep scale`, for the settings that were not left alone."""
    settings = dict(scaling.settings)
    flags = []
    for name, flag, factor, unit in (
        ("workers", "--workers", 1, ""),
        ("global_batches", "--global-batch", 1, ""),
        ("exchange", "--exchange", 1, ""),
        ("rounds", "--rounds", 1, ""),
        ("seconds_per_run", "--seconds", 1, ""),
        ("nodes_up_to", "--nodes-up-to", 1, ""),
        # Networks are sold in bits per second.
        ("bandwidth_bytes_per_second", "--bandwidth", 8e-6, "Mbit"),
        ("latency_seconds", "--latency", 1e6, "us"),
    ):
        value = settings.get(name)
        if isinstance(value, (list, tuple)):
            value = ",".join(map(str, value))
        if unit and isinstance(value, (int, float)):
            value = f"{value * factor:.10g}"
        if value is not None:
            flags += [flag, f"{value}{unit}"]
    return [*flags, "--weak"] if settings.get("weak") else flags
