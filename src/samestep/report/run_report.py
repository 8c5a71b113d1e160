"""The report of one run: which blocks it has, in which order."""

import math

from samestep.report import classes, curves, surroundings
from samestep.report.document import (
    Block,
    Code,
    Document,
    Fact,
    Facts,
    Pictures,
    Row,
    Section,
    Sheets,
    Table,
    Text,
    together,
)
from samestep.report.reading import RunFiles
from samestep.report.records import Epoch, Result
from samestep.report.run_data import plain_data
from samestep.report.run_time import time_section
from samestep.report.words import (
    MISSING,
    clean,
    count,
    number,
    percent,
    seconds,
    setting,
)


MOST_ROWS = 100
"""A longer table is not read."""


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
        surroundings.machine_section(run.environment),
        surroundings.repeat_section(
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
    blocks: list[Block] = [Facts(facts)]
    if result.weights_sha256:
        caption = "Fingerprint of the weights (SHA-256)"
        blocks.append(Code(caption, result.weights_sha256))
    return Section("Summary", "summary", blocks)


def _facts(result: Result, last: Epoch | None) -> list[Fact]:
    workers = result.placement.get("workers")
    exchange = setting(result.placement.get("exchange", "unknown"))
    facts = []
    if result.test_accuracy is not None:
        facts.append(Fact("Test accuracy", percent(result.test_accuracy, 2)))
    if result.test_loss is not None:
        facts.append(Fact("Test loss", number(result.test_loss, ".4f")))
    if last and last.validation_accuracy is not None:
        accuracy = percent(last.validation_accuracy, 2)
        facts.append(Fact("Validation accuracy", accuracy, "after the last epoch"))
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


def _learning(run: RunFiles) -> Section:
    epochs = run.result.epochs
    plots = [
        curves.learning_plot("loss", run.steps, epochs),
        curves.learning_plot("accuracy", run.steps, epochs),
        curves.rate_plot(run.steps),
        curves.throughput_plot(run.steps),
        curves.noise_plot(run.steps, epochs),
    ]
    blocks = together(plots)
    if epochs:
        blocks.append(_epoch_table(epochs))
    return Section("Learning", "learning", blocks)


def _epoch_table(epochs: list[Epoch]) -> Table:
    columns: Row = ("epoch", "time", "samples/s", "training loss", "training accuracy")
    columns += ("validation loss", "validation accuracy", "fingerprint")
    stride = math.ceil(len(epochs) / MOST_ROWS)
    rows = [
        (
            str(epoch.epoch),
            seconds(epoch.seconds),
            count(epoch.samples_per_second),
            number(epoch.train_loss, ".4f"),
            percent(epoch.train_accuracy, 2),
            number(epoch.validation_loss, ".4f"),
            percent(epoch.validation_accuracy, 2),
            epoch.weights_sha256[:12] or MISSING,
        )
        for epoch in epochs[::-stride][::-1]
    ]
    caption = "Epochs"
    if stride > 1:
        caption += f" ({len(rows)} of {len(epochs):,}; all in result.json)"
    return Table(caption, columns, rows)


def _classes(result: Result) -> Section:
    blocks: list[Block] = []
    if classes.is_matrix(result.test_confusion):
        blocks += together([classes.confusion_plot(result.test_confusion)])
        blocks.append(classes.class_table(result.test_confusion))
    pictures = classes.worst_pictures(result)
    if pictures:
        blocks.append(Text("The test samples with the highest loss:"))
        blocks.append(Pictures(pictures))
    elif result.test_worst:
        blocks.append(classes.worst_table(result.test_worst))
    return Section("Classes", "classes", blocks)


def _recipe(result: Result) -> Section:
    caption = "Recipe: it fixes the result"
    sheets = [surroundings.settings_sheet(caption, result.recipe)]
    if result.placement:
        caption = "Placement: it fixes only the time"
        sheets.append(surroundings.settings_sheet(caption, result.placement))
    return Section("Recipe and placement", "recipe", [Sheets(sheets)])
