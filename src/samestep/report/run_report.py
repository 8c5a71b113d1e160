"""The report of one run: which blocks it has, in which order."""

import math
from collections.abc import Mapping

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
    together,
)
from samestep.document.formatting import (
    MISSING,
    Value,
    count,
    number,
    plain_name,
    score,
    seconds,
    setting,
)
from samestep.output.schema import Epoch, Result, measured
from samestep.report import confusion, learning_plots, provenance
from samestep.report.embedded_data import plain_data
from samestep.report.load import RunFiles
from samestep.report.time_section import time_section
from samestep.system.terminal import clean


MOST_ROWS = 100
"""A longer table is not read."""
SPLITS = {"train": "training", "validation": "validation"}


def run_document(run: RunFiles) -> Document:
    """Figures are made here: call it in `ink.style()`."""
    result = run.result
    name = setting(result.recipe.get("name", run.path.name))
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
    return Document(
        title=clean(name),
        subtitle=clean(f"A training with samestep, recorded in {run.path}"),
        status=result.status,
        notices=run.notices,
        sections=[section for section in sections if section.blocks],
        data=plain_data(run),
    )


def _summary(run: RunFiles) -> Section:
    result = run.result
    last = result.epochs[-1] if result.epochs else None
    facts = _facts(result, last)
    if result.test_loss is None and run.steps:
        reached = run.steps[-1]
        loss = number(reached.loss, ".4f")
        facts.insert(0, Fact("Training loss", loss, f"at step {reached.step:,}"))
    blocks: list[Block] = [KeyFigures(facts)]
    if result.weights_sha256:
        caption = "Fingerprint of the weights (SHA-256)"
        blocks.append(Code(caption, result.weights_sha256))
    return Section("Summary", "summary", blocks)


def _facts(result: Result, last: Epoch | None) -> list[Fact]:
    workers = result.placement.get("workers")
    exchange = setting(result.placement.get("exchange", "unknown"))
    facts = []
    for name in result.metrics:
        if (value := measured(result, f"test_{name}")) is not None:
            facts.append(Fact(f"Test {plain_name(name)}", score(name, value)))
    if result.test_loss is not None:
        facts.append(Fact("Test loss", number(result.test_loss, ".4f")))
        facts += _bits(result.test_loss, result.baselines)
    for name in result.metrics:
        value = measured(last, f"validation_{name}") if last else None
        if value is not None:
            title = f"Validation {plain_name(name)}"
            facts.append(Fact(title, score(name, value), "after the last epoch"))
    if result.train_seconds is not None:
        wall = seconds(result.wall_seconds)
        facts.append(
            Fact("Training time", seconds(result.train_seconds), f"{wall} in all")
        )
    if last and last.samples_per_second is not None:
        rate = count(last.samples_per_second)
        facts.append(Fact("Samples per second", rate, "in the last epoch"))
    facts.append(Fact("Workers", setting(workers), f"exchange: {exchange}"))
    facts.append(Fact("Restarts", count(result.restarts), "after failures"))
    if result.noise_scale is not None:
        scale = count(result.noise_scale)
        facts.append(Fact("Noise scale", scale, "samples: the critical batch size"))
    return facts


def _bits(loss: float, baselines: Mapping[str, Value]) -> list[Fact]:
    """Of a model of text, which are compared with simple methods; else nothing."""
    if not baselines:
        return []
    others = ", ".join(f"{name} {number(b, '.3f')}" for name, b in baselines.items())
    return [Fact("Bits per character", number(loss / math.log(2), ".3f"), others)]


def _learning(run: RunFiles) -> Section:
    epochs = run.result.epochs
    plots = [
        learning_plots.learning_plot("loss", run.steps, epochs),
        *(
            learning_plots.learning_plot(m, run.steps, epochs)
            for m in run.result.metrics
        ),
        learning_plots.rate_plot(run.steps),
        learning_plots.throughput_plot(run.steps),
        learning_plots.noise_plot(run.steps, epochs),
    ]
    blocks = together(plots)
    if epochs:
        blocks.append(_epoch_table(epochs, run.result.metrics))
    return Section("Learning", "learning", blocks)


def _epoch_table(epochs: list[Epoch], metrics: list[str]) -> Table:
    scores = [(split, name) for split in SPLITS for name in ("loss", *metrics)]
    titles = [f"{SPLITS[split]} {plain_name(name)}" for split, name in scores]
    columns: Row = ("epoch", "time", "samples/s", *titles, "fingerprint")
    stride = math.ceil(len(epochs) / MOST_ROWS)
    rows = [
        (
            str(epoch.epoch),
            seconds(epoch.seconds),
            count(epoch.samples_per_second),
            *(_score_cell(epoch, split, name) for split, name in scores),
            epoch.weights_sha256[:12] or MISSING,
        )
        for epoch in epochs[::-stride][::-1]
    ]
    caption = "Epochs"
    if stride > 1:
        caption += f" ({len(rows)} of {len(epochs):,}; all in result.json)"
    return Table(caption, columns, rows)


def _score_cell(epoch: Epoch, split: str, name: str) -> str:
    value = measured(epoch, f"{split}_{name}")
    return number(value, ".4f") if name == "loss" else score(name, value)


def _classes(result: Result) -> Section:
    blocks: list[Block] = []
    if confusion.is_matrix(result.test_confusion):
        blocks += together([confusion.confusion_plot(result.test_confusion)])
        blocks.append(confusion.class_table(result.test_confusion))
    pictures = confusion.worst_pictures(result)
    if pictures:
        blocks.append(Text("The test samples with the highest loss:"))
        blocks.append(Pictures(pictures))
    elif result.test_worst:
        blocks.append(confusion.worst_table(result.test_worst))
    return Section("Classes", "classes", blocks)


def _recipe(result: Result) -> Section:
    caption = "Recipe: it fixes the result"
    sheets = [provenance.settings_sheet(caption, result.recipe)]
    if result.placement:
        caption = "Placement: it fixes only the time"
        sheets.append(provenance.settings_sheet(caption, result.placement))
    return Section("Recipe and placement", "recipe", [Sheets(sheets)])
