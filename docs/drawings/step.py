"""A training step, animated: a worker dies, its work moves, the sum is the same."""

from film import Film
from language import WIDTH
from treeshape import LEAVES, SQUARE, Shape, children, height, owner, sums

from samestep.core import ownership
from samestep.core.tree import Range


BEFORE = [(0, 2), (2, 5), (5, 8)]
AFTER = ownership.shares(LEAVES, 2)
SHAPE = Shape(134)
END = 19.0
BITS = 0x522364
"""A pattern to look at: the first bits of the fingerprint in the README."""
CAPTIONS = (
    (0.2, 2.8, "The seed cuts a step into 8 micro-batches."),
    (2.8, 5.6, "Three workers compute them one by one."),
    (5.6, 8.4, "Gradients are summed in one fixed tree."),
    (8.4, 10.2, "The weights are updated."),
    (10.2, 12.0, "Worker 2 dies."),
    (12.0, 13.8, "Two workers restart from the snapshot."),
    (13.8, 17.2, "The same micro-batches, the same tree ..."),
    (17.2, END, "One worker fewer, and the same bits."),
)
STAGES = (
    ("plan", 60, ((0.2, 2.8), (12.0, 13.8))),
    ("micro-batches", 144, ((2.8, 5.6), (13.8, 15.4))),
    ("tree", 60, ((5.6, 8.4), (15.4, 17.2))),
    ("update", 86, ((8.4, 10.2), (17.2, END))),
)


def draw() -> str:
    """Return docs/step.svg."""
    film = Film(
        (WIDTH, 534),
        "A step is cut into eight micro-batches. Three workers compute them and sum "
        "the gradients in a fixed tree. One worker dies; the other two own its "
        "micro-batches, and the same sum comes out, bit for bit.",
        seconds=END,
        before=3,
    )
    _stages(film)
    _tree(film)
    _workers(film)
    _pass(film, BEFORE, starts=2.9, pace=0.85, adds=5.7, ends=12.0)
    _pass(film, AFTER, starts=13.9, pace=0.38, adds=15.5, ends=END)
    _weights(film)
    _sums(film)
    for start, end, text in CAPTIONS:
        kind = "red b" if "dies" in text else "ink b"
        film.text(280, 508, text, f"{kind} huge {film.shown((start, end))}")
    return film.svg()


def _stages(film: Film) -> None:
    """Draw the stages of a step, the current one highlighted."""
    x = 280 - (sum(w for _, w, _ in STAGES) + 24 * (len(STAGES) - 1)) / 2
    for at, (name, width, spans) in enumerate(STAGES):
        if at:
            film.text(x - 12, 41, "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}")
        film.text(x + width / 2, 40.5, name, "muted")
        lit = film.shown(*spans)
        film.add(f'<g class="{lit}">')
        film.pill(x, 20, width, name, "ink", "paper")
        film.add("</g>")
        x += width + 24


def _tree(film: Film) -> None:
    """Draw the leaves and the tree, which do not depend on the workers."""
    film.add(f'<g class="{film.shown((1.9, END))}">')
    for node in sums():
        for child in children(node):
            film.path(SHAPE.edge(child, node), "edge s-rule")
    for node in sums():
        SHAPE.plus(film, node, "soft s-rule", "muted")
    x, y = SHAPE.centre((0, LEAVES))
    film.arrow(f"M{x + 18} {y}H366", (372, y), "right", "line")
    film.add("</g>")
    whole = film.shown((0.2, 1.4))
    film.text(280, 108, "one global batch", f"muted b big {whole}")
    for leaf in range(LEAVES):
        together = film.width / 2 + (leaf - LEAVES / 2) * SQUARE - SHAPE.corner(leaf)[0]
        film.add(f'<g class="{film.arrives(1.2, 1.9, together)}">')
        SHAPE.leaf(film, leaf, "soft s-rule", "muted")
        film.add("</g>")


def _workers(film: Film) -> None:
    """Draw the owners of the micro-batches, before and after a worker dies."""
    for worker, owned in enumerate(BEFORE):
        dies = worker == len(BEFORE) - 1
        film.add(f'<g class="{film.shown((2.8, 10.2 if dies else 12.0))}">')
        SHAPE.owner(film, worker, owned)
        film.add("</g>")
    x, width = SHAPE.span(BEFORE[-1])
    film.add(f'<g class="{film.shown((10.2, 12.4))}">')
    film.box(x, 84, width, 30, "paper s-red", radius=15)
    film.text(x + width / 2, 104.5, "worker 2", "red b")
    film.path(f"M{x + 20} 99H{x + width - 20}", "edge s-red")
    film.add("</g>")
    film.add(f'<g class="{film.shown((12.4, END))}">')
    for worker, owned in enumerate(AFTER):
        SHAPE.owner(film, worker, owned)
    film.add("</g>")


def _pass(
    film: Film,
    shares: list[Range],
    starts: float,
    pace: float,
    adds: float,
    ends: float,
) -> None:
    """Draw the computation of the micro-batches, then the sums, level by level."""
    for worker, (first, end) in enumerate(shares):
        dies = shares is BEFORE and worker == len(shares) - 1
        for turn, leaf in enumerate(range(first, end)):
            seen = film.shown((starts + pace * turn, 10.2 if dies else ends))
            film.add(f'<g class="{seen}">')
            SHAPE.leaf(film, leaf, f"w{worker}", "on")
            film.add("</g>")
    pace = ((8.2 if shares is BEFORE else 17.1) - adds) / 3
    gone = 10.2 if shares is BEFORE else ends
    for draw in (_flow, _sum):
        for node in sums():
            start = adds + pace * (height(node) - 1)
            draw(film, node, owner(node, shares), (start, start + pace, gone))


def _flow(
    film: Film, node: Range, kind: str, times: tuple[float, float, float]
) -> None:
    """Move two values to their node."""
    start, arrive, gone = times
    x, y = SHAPE.centre(node)
    lit = film.shown((0.3 * start + 0.7 * arrive, gone))
    for child in children(node):
        from_x, from_y = SHAPE.foot(child)
        film.path(SHAPE.edge(child, node), f"edge s-{kind} {lit}")
        way = f"--x:{x - from_x:g}px;--y:{y - from_y:g}px"
        film.add(f'<g style="{way}" class="{film.travels(start, arrive)}">')
        film.circle(from_x, from_y, 6, kind)
        film.add("</g>")


def _sum(film: Film, node: Range, kind: str, times: tuple[float, float, float]) -> None:
    """Draw the sum of two values."""
    start, arrive, gone = times
    film.add(f'<g class="{film.shown((0.3 * start + 0.7 * arrive, gone))}">')
    SHAPE.plus(film, node, kind, "on")
    film.add("</g>")


def _weights(film: Film) -> None:
    """Draw the weights: updated, reset with the lost step, and updated again."""
    _, root_y = SHAPE.centre((0, LEAVES))
    states = (
        ("weights, step 7", "soft s-rule", "muted", ((0.2, 8.6),)),
        ("weights, step 8", "grey", "on", ((8.6, 10.2), (17.4, END))),
        ("snapshot, step 7", "soft s-red", "red", ((10.2, 17.4),)),
    )
    for text, kind, tone, spans in states:
        film.add(f'<g class="{film.shown(*spans)}">')
        film.pill(374, root_y - 15, 166, text, kind, tone)
        film.add("</g>")


def _sums(film: Film) -> None:
    """Draw the bits of both sums, for comparison by eye."""
    film.path("M28 380H532", "s-rule")
    for y, workers, start in ((410, 3, 8.4), (446, 2, 17.2)):
        film.text(50, y + 6, f"sum by {workers} workers", "muted", "start")
        for bit in range(24):
            film.box(202 + 12 * bit, y - 9, 9, 20, "soft", radius=2)
        film.add(f'<g class="{film.shown((start, END))}">')
        for bit in range(24):
            if BITS >> (23 - bit) & 1:
                film.box(202 + 12 * bit, y - 9, 9, 20, "ink", radius=2)
        film.add("</g>")
    film.add(f'<g class="{film.shown((17.8, END))}">')
    film.path("M498 411H507V447H498", "edge s-w2")
    film.path("M516 425H530M516 433H530", "edge s-w2")
    film.add("</g>")
