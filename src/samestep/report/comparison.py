"""Several runs in one report: their curves, and how the runs differ."""

from collections.abc import Sequence

from matplotlib.ticker import PercentFormatter

from samestep.document import blocks as doc
from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.output.schema import measured
from samestep.report import learning_plots
from samestep.report.learning_plots import Curve
from samestep.report.load import RunFiles
from samestep.system.json_values import JsonObject
from samestep.system.terminal import clean


MAX_RUNS = 12
"""As many curves as colours and dashes can distinguish."""
DASHES = ("-", "--")
Runs = dict[str, RunFiles]
"""By letter."""


def comparison_document(runs: Sequence[RunFiles]) -> doc.Document:
    """Return a report on several runs; call it in `plot_style.style()`."""
    named = {letter(at): run for at, run in enumerate(runs)}
    notices = [
        f"{name}: {notice}" for name, run in named.items() for notice in run.notices
    ]
    if len(runs) > MAX_RUNS:
        notices.append(f"The figures show the first {MAX_RUNS} of {len(runs)} runs.")
    sections = [
        doc.Section("Results", "results", [_results(named), doc.Text(_verdict(named))]),
        doc.Section("Curves", "curves", _curves(dict([*named.items()][:MAX_RUNS]))),
        doc.Section("Differences", "differences", _differences(named)),
    ]
    paths = ", ".join(f"{name}: {run.path}" for name, run in named.items())
    title = f"{len(runs)} runs compared"
    return doc.Document(title, clean(paths), "", notices, sections)


def letter(at: int) -> str:
    """Return A to Z, then AA, AB and so on."""
    first, last = divmod(at, 26)
    return (letter(first - 1) if first else "") + chr(ord("A") + last)


def _results(runs: Runs) -> doc.Table:
    return doc.table(
        "Runs",
        [(name, run.path, run.result) for name, run in runs.items()],
        {
            "run": lambda run: run[0],
            "directory": lambda run: str(run[1]),
            "status": lambda run: run[2].status,
            "test accuracy": lambda run: fmt.percent(run[2].test_accuracy, 2),
            "test loss": lambda run: fmt.score("loss", run[2].test_loss),
            "training time": lambda run: fmt.seconds(run[2].train_seconds),
            "workers": lambda run: fmt.setting(run[2].placement.get("workers")),
            "restarts": lambda run: fmt.count(run[2].restarts),
            "weights": lambda run: fmt.digest(run[2].weights_sha256),
        },
        words=3,
    )


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


def _curves(runs: Runs) -> list[doc.Block]:
    metrics = dict.fromkeys(m for run in runs.values() for m in run.result.metrics)
    titles = {
        "validation_loss": "Validation loss",
        **{f"validation_{m}": f"Validation {fmt.plain_name(m)}" for m in metrics},
        "seconds": "Seconds per epoch",
        "samples_per_second": "Samples per second",
    }
    curves = {
        name: learning_plots.finite((step.step, step.loss) for step in run.steps)
        for name, run in runs.items()
    }
    plots = [_plot("training-loss", "Training loss", "step", curves)]
    for field, title in titles.items():
        curves = {
            name: learning_plots.finite(
                (epoch.epoch, measured(epoch, field)) for epoch in run.result.epochs
            )
            for name, run in runs.items()
        }
        plots.append(_plot(field.replace("_", "-"), title, "epoch", curves))
    return doc.side_by_side(plots)


def _plot(
    name: str, title: str, over: str, curves: dict[str, Curve]
) -> doc.Plot | None:
    """Draw a line for each run."""
    if not any(curves.values()):
        return None
    figure, axes = plot_style.figure()
    for at, (label, curve) in enumerate(curves.items()):
        below = len(curves) - 1 - at
        axes.plot(
            *learning_plots.xy(learning_plots.thin(curve)),
            color=plot_style.SERIES[at % len(plot_style.SERIES)],
            linestyle=DASHES[at // len(plot_style.SERIES) % len(DASHES)],
            # Equal curves cover each other, so the lower ones are wider.
            linewidth=1.2 + min(1.6, 4 / len(curves)) * below,
            marker="o" if over == "epoch" else None,
            markersize=3 + min(2, 4 / len(curves)) * below,
            label=label,
        )
    plot_style.name_axes(axes, title.lower(), over, ticks=6)
    if name == "validation-accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    elif name == "samples-per-second":
        axes.yaxis.set_major_formatter(plot_style.thousands())
    if name in ("seconds", "samples-per-second"):
        learning_plots.from_zero(axes)
    plot_style.legend_below(figure, axes)
    text = f"{title} of {len(curves)} runs over their {over}s."
    return doc.Plot(name, title, text, figure)


def _differences(runs: Runs) -> list[doc.Block]:
    parts = {
        "Recipe": [run.result.recipe for run in runs.values()],
        "Placement": [run.result.placement for run in runs.values()],
        "Machine and software": [run.environment for run in runs.values()],
    }
    return [_difference(caption, tuple(runs), part) for caption, part in parts.items()]


def _difference(caption: str, names: doc.Row, parts: Sequence[JsonObject]) -> doc.Block:
    """List the settings that differ between runs."""
    fields = [dict(fmt.flat(part)) for part in parts]
    known = dict.fromkeys(name for part in fields for name in part)
    values = {name: [fmt.setting(part.get(name)) for part in fields] for name in known}
    rows = [(name, *row) for name, row in values.items() if len(set(row)) > 1]
    if not rows:
        return doc.Text(f"{caption}: no difference.")
    columns = ("setting", *names)
    return doc.Table(caption, columns, rows, words=len(columns))
