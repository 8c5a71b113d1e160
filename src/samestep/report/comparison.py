"""Several runs in one report: their curves, and how the runs differ."""

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
    side_by_side,
)
from samestep.document.formatting import (
    count,
    digest,
    flat,
    number,
    percent,
    plain_name,
    seconds,
    setting,
)
from samestep.output.schema import measured
from samestep.report import learning_plots
from samestep.report.learning_plots import Curve
from samestep.report.load import RunFiles
from samestep.system.json_values import JsonObject
from samestep.system.terminal import clean


MOST_RUNS = 12
"""As many curves as colours and dashes can distinguish."""
DASHES = ("-", "--")
Runs = dict[str, RunFiles]
"""By letter."""


def comparison_document(runs: Sequence[RunFiles]) -> Document:
    """Return a report on several runs; call it in `plot_style.style()`."""
    named = {letter(at): run for at, run in enumerate(runs)}
    notices = [
        f"{name}: {notice}" for name, run in named.items() for notice in run.notices
    ]
    if len(runs) > MOST_RUNS:
        notices.append(f"The figures show the first {MOST_RUNS} of {len(runs)} runs.")
    sections = [
        Section("Results", "results", _results(named)),
        Section("Curves", "curves", _curves(dict([*named.items()][:MOST_RUNS]))),
        Section("Differences", "differences", _differences(named)),
    ]
    paths = ", ".join(f"{name}: {run.path}" for name, run in named.items())
    title = f"{len(runs)} runs compared"
    return Document(title, clean(paths), "", notices, sections)


def letter(at: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    first, last = divmod(at, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _results(runs: Runs) -> list[Block]:
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
            digest(run.result.weights_sha256),
        )
        for name, run in runs.items()
    ]
    return [Table("Runs", columns, rows, words=3), Text(_verdict(runs))]


def _verdict(runs: Runs) -> str:
    """Say which runs have the same bits."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        if run.result.weights_sha256:
            groups.setdefault(run.result.weights_sha256, []).append(name)
    same = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if not same:
        return "No two of these runs have the same weights."
    return f"The same weights, bit for bit: {'; '.join(same)}."


def _curves(runs: Runs) -> list[Block]:
    metrics = dict.fromkeys(m for run in runs.values() for m in run.result.metrics)
    titles = {
        "validation_loss": "Validation loss",
        **{f"validation_{m}": f"Validation {plain_name(m)}" for m in metrics},
        "seconds": "Seconds per epoch",
        "samples_per_second": "Samples per second",
    }
    curves = {
        name: learning_plots.over_steps(run.steps, lambda step: step.loss)
        for name, run in runs.items()
    }
    plots = [_plot("training-loss", "Training loss", "step", curves)]
    for field, title in titles.items():
        read = partial(measured, name=field)
        curves = {
            name: learning_plots.over_epochs(run.result.epochs, [], read)
            for name, run in runs.items()
        }
        plots.append(_plot(field.replace("_", "-"), title, "epoch", curves))
    return side_by_side(plots)


def _plot(name: str, title: str, over: str, curves: dict[str, Curve]) -> Plot | None:
    """Draw a line for each run."""
    if not any(curves.values()):
        return None
    figure, axes = plot_style.figure()
    for at, (label, curve) in enumerate(curves.items()):
        thinned = learning_plots.thin(curve)
        below = len(curves) - 1 - at
        axes.plot(
            [x for x, _ in thinned],
            [y for _, y in thinned],
            color=plot_style.SERIES[at % len(plot_style.SERIES)],
            linestyle=DASHES[at // len(plot_style.SERIES) % len(DASHES)],
            # Equal curves cover each other, so the lower ones are wider.
            linewidth=1.2 + min(1.6, 4 / len(curves)) * below,
            marker="o" if over == "epoch" else None,
            markersize=3 + min(2, 4 / len(curves)) * below,
            label=label,
        )
    learning_plots.name_axes(axes, title.lower(), over)
    if name == "validation-accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    elif name == "samples-per-second":
        axes.yaxis.set_major_formatter(learning_plots.thousands())
    if name in ("seconds", "samples-per-second"):
        learning_plots.from_zero(axes)
    plot_style.legend_below(figure, axes)
    return Plot(
        name, title, f"{title} of {len(curves)} runs over their {over}s.", figure
    )


def _differences(runs: Runs) -> list[Block]:
    parts = {
        "Recipe": [run.result.recipe for run in runs.values()],
        "Placement": [run.result.placement for run in runs.values()],
        "Machine and software": [run.environment for run in runs.values()],
    }
    return [_difference(caption, tuple(runs), part) for caption, part in parts.items()]


def _difference(caption: str, names: Row, parts: Sequence[JsonObject]) -> Block:
    """List the settings that differ between runs."""
    fields = [dict(flat(part)) for part in parts]
    known = dict.fromkeys(name for part in fields for name in part)
    values = {name: [setting(part.get(name)) for part in fields] for name in known}
    rows = [(name, *row) for name, row in values.items() if len(set(row)) > 1]
    if not rows:
        return Text(f"{caption}: no difference.")
    columns = ("setting", *names)
    return Table(caption, columns, rows, words=len(columns))
