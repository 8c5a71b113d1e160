"""What a classifier got wrong: the confusion matrix and the worst test images."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from pydantic import ValidationError

from samestep.config.data import MnistData
from samestep.data.sources import mnist
from samestep.document import formatting as fmt
from samestep.document import plot_style
from samestep.document.blocks import Picture, Plot, Table, table
from samestep.errors import SamestepError
from samestep.output.schema import Result, Worst


MAX_CLASSES = 20
"""More cells than this cannot be read in a figure."""
SCALE = 4
"""Pixels in the report for each pixel of an image, in each direction."""


def is_matrix(confusion: Sequence[Sequence[int]]) -> bool:
    """Return whether there are as many columns as rows, and at least one."""
    return bool(confusion) and all(len(row) == len(confusion) for row in confusion)


def confusion_plot(confusion: Sequence[Sequence[int]]) -> Plot | None:
    """Draw the counts; the darker a cell, the larger its share of the row."""
    classes = len(confusion)
    if not is_matrix(confusion) or classes > MAX_CLASSES:
        return None
    figure, axes = plot_style.figure(max(4.0, 0.42 * classes), max(3.6, 0.4 * classes))
    for row, counts in enumerate(confusion):
        samples = sum(counts) or 1
        for column, amount in enumerate(counts):
            _draw_cell(axes, row, column, amount, amount / samples)
    axes.set(
        xlim=(-0.5, classes - 0.5),
        ylim=(classes - 0.5, -0.5),
        aspect="equal",
        xticks=range(classes),
        yticks=range(classes),
        xlabel="predicted class",
        ylabel="true class",
    )
    axes.tick_params(length=0)
    axes.grid(visible=False)
    right = sum(confusion[at][at] for at in range(classes))
    samples = sum(map(sum, confusion))
    return Plot(
        "confusion",
        "Confusion matrix",
        f"{fmt.count(right)} of {fmt.count(samples)} test samples are classified "
        "correctly; the table of classes has the numbers.",
        figure,
        "Test samples: correct on the diagonal, wrong (red) elsewhere.",
    )


def class_table(confusion: Sequence[Sequence[int]]) -> Table:
    """List recall and precision of each class, and its most frequent confusion."""
    right = [row[at] for at, row in enumerate(confusion)]
    samples = [sum(row) for row in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    return table(
        "Test samples by true class",
        range(len(confusion)),
        {
            "class": str,
            "samples": lambda at: fmt.count(samples[at]),
            "correct": lambda at: fmt.count(right[at]),
            "recall": lambda at: _share(right[at], samples[at]),
            "precision": lambda at: _share(right[at], predicted[at]),
            "most often taken for": lambda at: _mistaken(confusion[at], at),
        },
    )


def _share(right: int, all_of_them: int) -> str:
    return fmt.percent(right / all_of_them if all_of_them else None, 2)


def _mistaken(counts: Sequence[int], at: int) -> str:
    """Return which class the samples of class `at` were most often mistaken for."""
    wrong = [0 if other == at else amount for other, amount in enumerate(counts)]
    most = max(wrong)
    return f"{wrong.index(most)} ({fmt.count(most)})" if most else fmt.MISSING


def worst_pictures(result: Result) -> list[Picture]:
    """Return the images with the highest losses; nothing for other data than MNIST."""
    if not result.test_worst:
        return []
    try:
        recipe = MnistData.model_validate(result.recipe.get("data"))
        source = mnist.MnistSource(recipe)
        source.prepare()  # a damaged file in the cache is replaced
        images = source.arrays()["test"].inputs
    except (ValidationError, SamestepError):
        return []
    return [
        Picture(
            _png(images[worst.index].tobytes(), mnist.SHAPE[-1]),
            f"{worst.target} taken for {worst.predicted}",
            f"loss {fmt.number(worst.loss, '.2f')}, test image {worst.index:,}",
        )
        for worst in result.test_worst
        if 0 <= worst.index < len(images)
    ]


def worst_table(worst: Sequence[Worst]) -> Table:
    """List the samples with the highest losses."""
    return table(
        "Test samples with the highest loss",
        worst,
        {
            "index in the test split": lambda w: str(w.index),
            "true class": lambda w: str(w.target),
            "predicted class": lambda w: str(w.predicted),
            "loss": lambda w: fmt.score("loss", w.loss),
        },
    )


def _draw_cell(axes: Axes, row: int, column: int, amount: int, share: float) -> None:
    if not amount:
        return
    colour = plot_style.SERIES[0] if row == column else plot_style.PHASES["wait"]
    # Even a hundredth of a row must be visible: readers look for the errors.
    strength = 0.85 * share if row == column else min(0.85, 0.12 + 6 * share)
    corner = (column - 0.48, row - 0.48)
    axes.add_patch(Rectangle(corner, 0.96, 0.96, color=colour, alpha=strength))
    ink = plot_style.CARD if strength > 0.55 else plot_style.INK
    axes.text(
        column, row, f"{amount:,}", ha="center", va="center", fontsize=8, color=ink
    )


def _png(pixels: bytes, side: int) -> bytes:
    """Return an enlarged image, dark on light as on paper."""
    image = Image.frombytes("L", (side, side), pixels).point(lambda grey: 255 - grey)
    file = io.BytesIO()
    image.resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()
