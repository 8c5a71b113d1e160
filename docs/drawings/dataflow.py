"""From a recipe to the files of a run."""

from language import Drawing


OWNED = [(0, 2), (2, 5), (5, 8)]
LEFT, WIDE = 36, 300
"""Left edge and width of the boxes that everything goes through."""
RIGHT, NARROW = 372, 164
"""Left edge and width of the boxes beside them."""
HIGH = 84


def draw() -> str:
    """Return docs/dataflow.svg."""
    drawing = Drawing(
        792,
        "The recipe determines the plan: which samples make up which micro-batch. The "
        "placement says who computes them. Gradients are summed in the tree, workers "
        "update their slices, and metrics, checkpoints and results become files.",
    )
    _plan(drawing)
    _step(drawing)
    _results(drawing)
    return drawing.svg()


def _plan(drawing: Drawing) -> None:
    _wide(
        drawing,
        24,
        "recipe",
        "everything that fixes the result:",
        "model, data, seed, batch, optimizer",
    )
    _down(drawing, 108, 140)
    _wide(
        drawing,
        140,
        "plan",
        "one order per epoch, from the seed;",
        "global batches, micro-batches",
    )
    _down(drawing, 224, 256)
    _beside(drawing, 24, "placement", "workers, machines:", "changes no bit")
    drawing.arrow("M454 108V131", (454, 139), "down", "line")
    _beside(drawing, 140, "balance", "micro-batches", "by speed")
    drawing.path("M454 224V275", "edge s-line")
    drawing.arrow(f"M454 275H{LEFT + 318}", (LEFT + 310, 275), "left", "line")
    for worker, (first, end) in enumerate(OWNED):
        for leaf in range(first, end):
            drawing.box(LEFT - 2 + 39 * leaf, 256, 35, 36, f"w{worker}", radius=6)
            drawing.text(LEFT + 15.5 + 39 * leaf, 280, str(leaf), "on b")


def _step(drawing: Drawing) -> None:
    _down(drawing, 292, 322)
    _wide(
        drawing,
        322,
        "forward and backward",
        "a gradient for each; random numbers",
        "from seed, step and micro-batch",
    )
    _down(drawing, 406, 438)
    _wide(
        drawing,
        438,
        "tree",
        "partial sums in one fixed order:",
        "the gradient of the global batch",
    )
    _down(drawing, 522, 554)
    _wide(
        drawing,
        554,
        "update",
        "the optimizer; with shared memory,",
        "each worker updates a slice",
    )
    _down(drawing, 638, 670)
    drawing.box(LEFT, 670, WIDE, 40, "grey")
    drawing.text(LEFT + WIDE / 2, 695.5, "weights of the next step", "on b")
    drawing.path(f"M{LEFT} 690H18V364H{LEFT - 9}", "edge s-grey")
    drawing.head((LEFT - 1, 364), "right", "grey")


def _results(drawing: Drawing) -> None:
    """Draw the inputs and outputs beside the steps."""
    _beside(drawing, 322, "data", "samples by index,", "the same for all")
    drawing.arrow(f"M{RIGHT} 364H345", (337, 364), "left", "line")
    _beside(
        drawing, 438, "metrics.jsonl", "losses, summed in", "the tree; times", file=True
    )
    _beside(drawing, 554, "checkpoints/", "from snapshots", "in memory", file=True)
    for y in (480, 596, 690):
        drawing.arrow(f"M336 {y}H363", (371, y), "right", "line")
    drawing.box(RIGHT, 670, NARROW, 98, "paper s-line")
    for at, name in enumerate(("model.safetensors", "result.json", "report.html")):
        drawing.text(RIGHT + 10, 698 + 26 * at, name, "ink mono", "start")


def _wide(drawing: Drawing, y: float, head: str, *texts: str) -> None:
    drawing.box(LEFT, y, WIDE, HIGH, "soft s-rule")
    drawing.lines(LEFT + 14, y + 26, head, *texts)


def _beside(
    drawing: Drawing, y: float, head: str, *texts: str, file: bool = False
) -> None:
    drawing.box(RIGHT, y, NARROW, HIGH, "paper s-line" if file else "soft s-rule")
    drawing.lines(RIGHT + 10, y + 26, head, *texts)


def _down(drawing: Drawing, y: float, to_y: float) -> None:
    x = LEFT + WIDE / 2
    drawing.arrow(f"M{x} {y}V{to_y - 9}", (x, to_y - 1), "down", "line")
