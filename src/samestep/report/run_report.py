"""The report of one run: which blocks it has, in which order."""

import math
from collections.abc import Mapping

from samestep.document import formatting as fmt
from samestep.document.blocks import (
    Block,
    Code,
    Document,
    Fact,
    KeyFigures,
    Pictures,
    Row,
    Section,
    Sheets,
    Table,
    Text,
    side_by_side,
)
from samestep.output.schema import Epoch, Record, Result, measured
from samestep.report import confusion, learning_plots, provenance
from samestep.report.load import RunFiles
from samestep.report.time_section import time_section
from samestep.system.terminal import clean


MAX_ROWS = 100
"""Rows of the longest table that is still readable."""
SPLITS = {"train": "training", "validation": "validation"}


def run_document(run: RunFiles) -> Document:
    """Return the report of a run; call it in `plot_style.style()`."""
    result = run.result
    name = fmt.setting(result.recipe.get("name", run.path.name))
    sections = [
        _summary(run),
        _learning(run),
        time_section(run),
        _classes(result),
        _recipe(result),
        provenance.machine_section(run.environment),
        provenance.repeat_section(
            result.recipe, result.placement, str(run.path), result.weights_sha256
        ),
    ]
    subtitle = clean(f"A training with samestep, recorded in {run.path}")
    return Document(clean(name), subtitle, result.status, run.notices, sections)


def _summary(run: RunFiles) -> Section:
    result = run.result
    facts = _facts(result)
    if result.test_loss is None and run.steps:
        last = run.steps[-1]
        loss = fmt.number(last.loss, ".4f")
        facts.insert(0, Fact("Training loss", loss, f"at step {last.step:,}"))
    blocks: list[Block] = [KeyFigures(facts)]
    if result.weights_sha256:
        caption = "Fingerprint of the weights (SHA-256)"
        blocks.append(Code(caption, result.weights_sha256))
    return Section("Summary", "summary", blocks)


def _facts(result: Result) -> list[Fact]:
    last = result.epochs[-1] if result.epochs else None
    facts = _scores(result, "test", result.metrics)
    if result.test_loss is not None:
        facts.append(Fact("Test loss", fmt.number(result.test_loss, ".4f")))
        facts += _bits(result.test_loss, result.baselines)
    if last:
        note = "after the last epoch"
        facts += _scores(last, "validation", result.metrics, note)
    if result.train_seconds is not None:
        total = f"{fmt.seconds(result.wall_seconds)} in all"
        facts.append(Fact("Training time", fmt.seconds(result.train_seconds), total))
    if last and last.samples_per_second is not None:
        rate = fmt.count(last.samples_per_second)
        facts.append(Fact("Samples per second", rate, "in the last epoch"))
    workers = fmt.setting(result.placement.get("workers"))
    exchange = fmt.setting(result.placement.get("exchange", "unknown"))
    facts.append(Fact("Workers", workers, f"exchange: {exchange}"))
    facts.append(Fact("Restarts", fmt.count(result.restarts), "after failures"))
    if result.noise_scale is not None:
        scale = fmt.count(result.noise_scale)
        facts.append(Fact("Noise scale", scale, "samples: the critical batch size"))
    return facts


def _scores(
    record: Record, split: str, metrics: list[str], note: str = ""
) -> list[Fact]:
    values = {name: measured(record, f"{split}_{name}") for name in metrics}
    return [
        Fact(
            f"{split.capitalize()} {fmt.plain_name(name)}", fmt.score(name, value), note
        )
        for name, value in values.items()
        if value is not None
    ]


def _bits(loss: float, baselines: Mapping[str, fmt.Value]) -> list[Fact]:
    """Compare a model of text with simple methods; return nothing for other models."""
    if not baselines:
        return []
    others = ", ".join(
        f"{name} {fmt.number(b, '.3f')}" for name, b in baselines.items()
    )
    return [Fact("Bits per character", fmt.number(loss / math.log(2), ".3f"), others)]


def _learning(run: RunFiles) -> Section:
    epochs, names = run.result.epochs, ["loss", *run.result.metrics]
    plots = [
        *(learning_plots.learning_plot(name, run.steps, epochs) for name in names),
        learning_plots.rate_plot(run.steps),
        learning_plots.throughput_plot(run.steps),
        learning_plots.noise_plot(run.steps, epochs),
    ]
    blocks = side_by_side(plots)
    if epochs:
        blocks.append(_epoch_table(epochs, names))
    return Section("Learning", "learning", blocks)


def _epoch_table(epochs: list[Epoch], names: list[str]) -> Table:
    scores = [(split, name) for split in SPLITS for name in names]
    titles = [f"{SPLITS[split]} {fmt.plain_name(name)}" for split, name in scores]
    columns: Row = ("epoch", "time", "samples/s", *titles, "fingerprint")
    stride = math.ceil(len(epochs) / MAX_ROWS)
    rows = [
        (
            str(epoch.epoch),
            fmt.seconds(epoch.seconds),
            fmt.count(epoch.samples_per_second),
            *(_score_cell(epoch, split, name) for split, name in scores),
            fmt.digest(epoch.weights_sha256),
        )
        for epoch in epochs[::-stride][::-1]  # the last one is always shown
    ]
    caption = "Epochs"
    if stride > 1:
        caption += f" ({len(rows)} of {len(epochs):,}; all in result.json)"
    return Table(caption, columns, rows)


def _score_cell(epoch: Epoch, split: str, name: str) -> str:
    value = measured(epoch, f"{split}_{name}")
    return fmt.number(value, ".4f") if name == "loss" else fmt.score(name, value)


def _classes(result: Result) -> Section:
    blocks: list[Block] = []
    if confusion.is_matrix(result.test_confusion):
        blocks += side_by_side([confusion.confusion_plot(result.test_confusion)])
        blocks.append(confusion.class_table(result.test_confusion))
    pictures = confusion.worst_pictures(result)
    if pictures:
        blocks.append(Text("The test samples with the highest loss:"))
        blocks.append(Pictures(pictures))
    elif result.test_worst:
        blocks.append(confusion.worst_table(result.test_worst))
    return Section("Classes", "classes", blocks)


def _recipe(result: Result) -> Section:
    caption = "Recipe: it determines the result"
    sheets = [provenance.settings_sheet(caption, result.recipe)]
    if result.placement:
        caption = "Placement: it affects only the time"
        sheets.append(provenance.settings_sheet(caption, result.placement))
    return Section("Recipe and placement", "recipe", [Sheets(sheets)])
