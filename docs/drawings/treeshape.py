"""Where the leaves and sums of the canonical tree are drawn, and in whose colour."""

from dataclasses import dataclass

from language import WIDTH, Drawing

from samestep.core import tree
from samestep.core.tree import Range


SQUARE, PITCH, LEVEL, RADIUS = 46, 58, 56, 16
LEAVES = 8


def children(node: Range) -> list[Range]:
    """Return the two children of a sum; none for a leaf."""
    if node[1] - node[0] == 1:
        return []
    middle = tree.split(node)
    return [(node[0], middle), (middle, node[1])]


def sums(node: Range = (0, LEAVES)) -> list[Range]:
    """Return the nodes that are sums, each after its children."""
    below = [inner for child in children(node) for inner in sums(child)]
    return [*below, node] if children(node) else []


def height(node: Range) -> int:
    """Return the number of levels above the leaves."""
    return max((1 + height(child) for child in children(node)), default=0)


def owner(node: Range, shares: list[Range]) -> str:
    """Return the colour of the worker that sums a node alone; grey for several."""
    for worker, (first, end) in enumerate(shares):
        if first <= node[0] and node[1] <= end:
            return f"w{worker}"
    return "grey"


@dataclass(frozen=True)
class Shape:
    """A tree, centred on the card, its leaves at `top`."""

    top: float

    @property
    def left(self) -> float:
        """The x of the first leaf."""
        return (WIDTH - (LEAVES - 1) * PITCH - SQUARE) / 2

    def corner(self, leaf: int) -> tuple[float, float]:
        """Return the upper left corner of a leaf."""
        return self.left + PITCH * leaf, self.top

    def centre(self, node: Range) -> tuple[float, float]:
        """Return the centre of a leaf or a sum."""
        below = [self.centre(child)[0] for child in children(node)]
        if not below:
            x, y = self.corner(node[0])
            return x + SQUARE / 2, y + SQUARE / 2
        return sum(below) / 2, self.top + SQUARE / 2 + LEVEL * height(node) + 6

    def foot(self, node: Range) -> tuple[float, float]:
        """Return the point where the line to the next sum begins."""
        x, y = self.centre(node)
        return x, y if children(node) else y + SQUARE / 2

    def edge(self, child: Range, node: Range) -> str:
        """Return the path of that line."""
        (x, y), (to_x, to_y) = self.foot(child), self.centre(node)
        return f"M{x:g} {y:g}L{to_x:g} {to_y:g}"

    def leaf(self, drawing: Drawing, leaf: int, kind: str, tone: str) -> None:
        """Draw a leaf: a square with its number."""
        x, y = self.corner(leaf)
        drawing.box(x, y, SQUARE, SQUARE, kind)
        drawing.text(x + SQUARE / 2, y + 29, str(leaf), f"{tone} b")

    def plus(self, drawing: Drawing, node: Range, kind: str, tone: str) -> None:
        """Draw a sum: a disc with a plus."""
        x, y = self.centre(node)
        drawing.circle(x, y, RADIUS, kind)
        drawing.text(x, y + 6, "+", f"{tone} b big")

    def owner(self, drawing: Drawing, worker: int, owned: Range) -> None:
        """Draw the label above the micro-batches of a worker."""
        x, width = self.span(owned)
        kind = f"w{worker}"
        drawing.pill(x, self.top - 50, width, f"worker {worker}", kind)

    def span(self, owned: Range) -> tuple[float, float]:
        """Return the left edge and the width of that label."""
        first, end = owned
        return self.left - 4 + first * PITCH, (end - first) * PITCH - 4
