"""Several runs in one report: their curves, and what is different about them."""

from collections.abc import Sequence
from functools import partial

from matplotlib.ticker import PercentFormatter

from samestep.document import plot_style
from samestep.document.blocks import (
    Block,
    Document,
    Plot,
    Row,
    Section,
    Table,
    Text,
    together,
)
from samestep.document.formatting import (
    MISSING,
    count,
    flat,
    number,
    percent,
    plain_name,
    seconds,
    setting,
)
from samestep.output.schema import measured
from samestep.report import learning_plots
from samestep.report.embedded_data import plain_data
from samestep.report.load import RunFiles
from samestep.system.terminal import clean


MOST_RUNS = 12
"""Colours and dashes tell so many curves apart."""
DASHES = ("-", "--")


def comparison_document(runs: Sequence[RunFiles]) -> Document:
    """Figures are made here: call it in `ink.style()`."""
    names = [letter(at) for at in range(len(runs))]
    notices = [
        f"{name}: {notice}"
        for name, run in zip(names, runs, strict=True)
        for notice in run.notices
    ]
    if len(runs) > MOST_RUNS:
        notices.append(f"The figures show the first {MOST_RUNS} of {len(runs)} runs.")
    sections = [
        Section("Results", "results", _results(names, runs)),
        Section("Curves", "curves", _curves(names[:MOST_RUNS], runs[:MOST_RUNS])),
        Section("Differences", "differences", _differences(names, runs)),
    ]
    return Document(
        title=f"{len(runs)} runs compared",
        subtitle=clean(
            ", ".join(f"{n}: {r.path}" for n, r in zip(names, runs, strict=True))
        ),
        status="",
        notices=notices,
        sections=[section for section in sections if section.blocks],
        data={name: plain_data(run) for name, run in zip(names, runs, strict=True)},
    )


def letter(at: int) -> str:
    """A to Z, then AA, AB and so on."""
    first, last = divmod(at, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _results(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Block]:
    columns: Row = ("run", "directory", "status", "test accuracy", "test loss")
    columns += ("training time", "workers", "restarts", "weights")
    rows = [
        (
            name,
            str(run.path),
            run.result.status,
            percent(run.result.test_accuracy, 2),
            number(run.result.test_loss, ".4f"),
            seconds(run.result.train_seconds),
            setting(run.result.placement.get("workers")),
            count(run.result.restarts),
            run.result.weights_sha256[:12] or MISSING,
        )
        for name, run in zip(names, runs, strict=True)
    ]
    return [Table("Runs", columns, rows, words=3), Text(_verdict(names, runs))]


def _verdict(names: Sequence[str], runs: Sequence[RunFiles]) -> str:
    """Which runs have the same bits."""
    groups: dict[str, list[str]] = {}
    for name, run in zip(names, runs, strict=True):
        if run.result.weights_sha256:
            groups.setdefault(run.result.weights_sha256, []).append(name)
    same = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if not same:
        return "No two of these runs have the same weights."
    return f"The same weights, bit for bit: {'; '.join(same)}."


def _curves(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Block]:
    metrics = dict.fromkeys(m for run in runs for m in run.result.metrics)
    fields = (
        ("validation_loss", "Validation loss"),
        *((f"validation_{m}", f"Validation {plain_name(m)}") for m in metrics),
        ("seconds", "Seconds per epoch"),
        ("samples_per_second", "Samples per second"),
    )
    losses = [
        learning_plots.over_steps(run.steps, lambda step: step.loss) for run in runs
    ]
    plots = [_plot("training-loss", "Training loss", "step", names, losses)]
    for field, title in fields:
        read = partial(measured, name=field)
        lines = [
            learning_plots.over_epochs(run.result.epochs, [], read) for run in runs
        ]
        name = field.replace("_", "-")
        plots.append(_plot(name, title, "epoch", names, lines))
    return together(plots)


def _plot(
    name: str,
    title: str,
    over: str,
    names: Sequence[str],
    lines: Sequence[learning_plots.Curve],
) -> Plot | None:
    """A line for each run."""
    if not any(lines):
        return None
    figure, axes = plot_style.figure()
    for at, (letters, line) in enumerate(zip(names, lines, strict=True)):
        thinned = learning_plots.thin(line)
        axes.plot(
            [x for x, _ in thinned],
            [y for _, y in thinned],
            color=plot_style.SERIES[at % len(plot_style.SERIES)],
            linestyle=DASHES[at // len(plot_style.SERIES) % len(DASHES)],
            # Equal lines lie upon each other: the lower ones stick out.
            linewidth=1.2 + min(1.6, 4 / len(lines)) * (len(lines) - 1 - at),
            marker="o" if over == "epoch" else None,
            markersize=3 + min(2, 4 / len(lines)) * (len(lines) - 1 - at),
            label=letters,
        )
    learning_plots.name_axes(axes, title.lower(), over)
    if name == "validation-accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    elif name == "samples-per-second":
        axes.yaxis.set_major_formatter(learning_plots.thousands())
    if name in ("seconds", "samples-per-second"):
        learning_plots.from_zero(axes)
    plot_style.legend_below(figure, axes)
    text = f"{title} of {len(lines)} runs over their {over}s."
    return Plot(name, title, text, figure)


def _differences(names: Sequence[str], runs: Sequence[RunFiles]) -> list[Block]:
    blocks: list[Block] = []
    for caption, part in (
        ("Recipe", [run.result.recipe for run in runs]),
        ("Placement", [run.result.placement for run in runs]),
        ("Machine and software", [run.environment for run in runs]),
    ):
        fields = [dict(flat(found)) for found in part]
        known = dict.fromkeys(name for found in fields for name in found)
        rows = [
            (name, *(setting(found.get(name)) for found in fields))
            for name in known
            if len({setting(found.get(name)) for found in fields}) > 1
        ]
        if rows:
            columns = ("setting", *names)
            blocks.append(Table(caption, columns, rows, words=len(columns)))
        else:
            blocks.append(Text(f"{caption}: no difference."))
    return blocks
