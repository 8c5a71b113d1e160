"""The report of one run: which blocks it has, in which order."""

import math

from samestep.document import blocks as doc
from samestep.document import formatting as fmt
from samestep.output.schema import Epoch, Record, Result, Step, measured
from samestep.report import confusion, learning_plots, provenance
from samestep.report.load import RunFiles
from samestep.report.time_section import time_section
from samestep.system.terminal import clean


MAX_ROWS = 100
"""Rows of the longest table that is still readable."""
SPLITS = {"train": "training", "validation": "validation"}


def run_document(run: RunFiles) -> doc.Document:
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
    ]
    if not run.is_of_loop:
        repeat = result.recipe, result.placement, str(run.path), result.weights_sha256
        sections.append(provenance.repeat_section(*repeat))
    subtitle = clean(f"A training with samestep, recorded in {run.path}")
    return doc.Document(clean(name), subtitle, result.status, run.notices, sections)


def _summary(run: RunFiles) -> doc.Section:
    blocks = doc.key_figures([*_last_means(run), *_facts(run.result)])
    if run.result.weights_sha256:
        caption = "Fingerprint of the weights (SHA-256)"
        blocks.append(doc.Code(caption, run.result.weights_sha256))
    return doc.Section("Summary", "summary", blocks)


def _last_means(run: RunFiles) -> list[doc.Fact | None]:
    """Return the last loss of a run that has none of the test split.

    Of the user's own loop, all means: nobody knows on which data they were taken.
    """
    if run.result.test_loss is not None:
        return []
    names, split = ["loss"], "training "
    if run.is_of_loop:
        names, split = ["loss", *run.result.metrics], ""
    return [_last_mean(run.steps, name, split) for name in names]


def _last_mean(steps: list[Step], name: str, split: str) -> doc.Fact | None:
    found = ((step, measured(step, name)) for step in reversed(steps))
    step, value = next((pair for pair in found if pair[1] is not None), (None, None))
    if step is None:
        return None
    label = f"{split}{fmt.plain_name(name)}"
    note = f"at step {step.step:,}"
    return doc.Fact(label[0].upper() + label[1:], fmt.score(name, value), note)


def _facts(result: Result) -> list[doc.Fact | None]:
    last = result.epochs[-1] if result.epochs else Epoch(epoch=0)
    workers = fmt.setting(result.placement.get("workers"))
    exchange = fmt.setting(result.placement.get("exchange", "unknown"))
    total = f"{fmt.seconds(result.wall_seconds)} in all"
    batch_size = "samples: the critical batch size"
    evaluated = result.evaluations[-1] if result.evaluations else last
    ended = "in the last evaluation" if result.evaluations else "after the last epoch"
    return [
        *(_score(result, "test", name) for name in (*result.metrics, "loss")),
        _bits(result),
        *(_score(evaluated, "validation", name, ended) for name in result.metrics),
        doc.fact("Training time", result.train_seconds, fmt.seconds, total),
        doc.fact(
            "Samples per second",
            last.samples_per_second,
            fmt.count,
            "in the last epoch",
        ),
        doc.Fact("Workers", workers, f"exchange: {exchange}"),
        doc.Fact("Restarts", fmt.count(result.restarts), "after failures"),
        doc.fact("Noise scale", result.noise_scale, fmt.count, batch_size),
    ]


def _score(record: Record, split: str, name: str, note: str = "") -> doc.Fact | None:
    label = f"{split.capitalize()} {fmt.plain_name(name)}"
    value = measured(record, f"{split}_{name}")
    return doc.fact(label, value, lambda value: fmt.score(name, value), note)


def _bits(result: Result) -> doc.Fact | None:
    """Compare a model of text with simple methods; return nothing for other models."""
    if not result.baselines or result.test_loss is None:
        return None
    others = [f"{name} {fmt.number(b, '.3f')}" for name, b in result.baselines.items()]
    bits = fmt.number(result.test_loss / math.log(2), ".3f")
    return doc.Fact("Bits per character", bits, ", ".join(others))


def _learning(run: RunFiles) -> doc.Section:
    epochs, names = run.result.epochs, ["loss", *run.result.metrics]
    evaluated = run.result.evaluations
    plots = [
        *(learning_plots.learning_plot(n, run.steps, epochs, evaluated) for n in names),
        learning_plots.rate_plot(run.steps),
        learning_plots.throughput_plot(run.steps),
        learning_plots.noise_plot(run.steps, epochs),
    ]
    blocks = doc.side_by_side(plots)
    if epochs:
        blocks.append(_epoch_table(epochs, names))
    return doc.Section("Learning", "learning", blocks)


def _epoch_table(epochs: list[Epoch], names: list[str]) -> doc.Table:
    scores = {
        f"{title} {fmt.plain_name(name)}": (name, f"{split}_{name}")
        for split, title in SPLITS.items()
        for name in names
        if any(measured(epoch, f"{split}_{name}") is not None for epoch in epochs)
    }
    columns: doc.Row = ("epoch", "time", "samples/s", *scores, "fingerprint")
    stride = math.ceil(len(epochs) / MAX_ROWS)
    rows = [
        (
            str(epoch.epoch),
            fmt.seconds(epoch.seconds),
            fmt.count(epoch.samples_per_second),
            *(fmt.score(name, measured(epoch, key)) for name, key in scores.values()),
            fmt.digest(epoch.weights_sha256),
        )
        for epoch in epochs[::-stride][::-1]  # the last one is always shown
    ]
    caption = "Epochs"
    if stride > 1:
        caption += f" ({len(rows)} of {len(epochs):,}; all in result.json)"
    return doc.Table(caption, columns, rows)


def _classes(result: Result) -> doc.Section:
    blocks: list[doc.Block] = []
    if confusion.is_matrix(result.test_confusion):
        blocks += doc.side_by_side([confusion.confusion_plot(result.test_confusion)])
        blocks.append(confusion.class_table(result.test_confusion))
    pictures = confusion.worst_pictures(result)
    if pictures:
        blocks.append(doc.Text("The test samples with the highest loss:"))
        blocks.append(doc.Pictures(pictures))
    elif result.test_worst:
        blocks.append(confusion.worst_table(result.test_worst))
    return doc.Section("Classes", "classes", blocks)


def _recipe(result: Result) -> doc.Section:
    caption = "Recipe: it determines the result"
    sheets = [provenance.settings_sheet(caption, result.recipe)]
    if result.placement:
        caption = "Placement: it affects only the time"
        sheets.append(provenance.settings_sheet(caption, result.placement))
    return doc.Section("Recipe and placement", "recipe", [doc.Sheets(sheets)])
