"""The same tree with two and with three owners."""

from language import Drawing
from treeshape import LEAVES, Shape, children, owner, sums

from samestep.core.tree import Range


def draw() -> str:
    """Return docs/tree.svg."""
    drawing = Drawing(
        596,
        "The micro-batches of one step, owned by two or by three workers, are summed "
        "in the same tree.",
    )
    _owned(drawing, Shape(76), [(0, 4), (4, 8)])
    drawing.path("M28 300H532", "s-rule")
    _owned(drawing, Shape(364), [(0, 2), (2, 5), (5, 8)])
    return drawing.svg()


def _owned(drawing: Drawing, shape: Shape, shares: list[Range]) -> None:
    for worker, owned in enumerate(shares):
        shape.owner(drawing, worker, owned)
    for node in sums():
        for child in children(node):
            kind = owner(node, shares)
            drawing.path(shape.edge(child, node), f"edge s-{kind}")
    for leaf in range(LEAVES):
        shape.leaf(drawing, leaf, owner((leaf, leaf + 1), shares), "on")
    for node in sums():
        shape.plus(drawing, node, owner(node, shares), "on")
    x, y = shape.centre((0, LEAVES))
    drawing.arrow(f"M{x + 18} {y}H366", (372, y), "right", "line")
    drawing.pill(374, y - 15, 166, "the same bits", "soft s-rule", "muted")
