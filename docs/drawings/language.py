"""The visual language of the drawings: one palette, a few shapes, light and dark.

A drawing is a card with its own background, so it can be read on any page, and follows
the reader's light or dark scheme. Colours mean the same everywhere: a worker's colour
is on whatever it owns, grey belongs to all, red is failure. They are the colours of
`samestep report`. Units are pixels of a card of WIDTH, which a phone shows at two
thirds.
"""

from html import escape


WIDTH = 560
COLOURS = {
    # name: on a light card, on a dark card
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#59616b", "#a2abb5"),
    "paper": ("#ffffff", "#161b22"),
    "soft": ("#f1f3f6", "#21272f"),
    "rule": ("#d3d8de", "#3a424b"),
    "line": ("#98a1ab", "#6c7681"),
    "grey": ("#6b7580", "#9aa4af"),
    "w0": ("#0072b2", "#5fb2ee"),
    "w1": ("#c04f00", "#ff9c66"),
    "w2": ("#00805d", "#41cca2"),
    "red": ("#c8281c", "#ff7b6b"),
    "tint0": ("#e2eff8", "#17293a"),
    "tint1": ("#fbeadf", "#3a2618"),
    "tint2": ("#def3ec", "#15312a"),
    "on": ("#ffffff", "#0d1117"),
}
SHAPES = (
    "text{font:16px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',"
    "'DejaVu Sans',sans-serif}"
    ".none{fill:none}.b{font-weight:700}.small{font-size:15px}.big{font-size:18px}.huge{font-size:20px}"
    ".mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',"
    "monospace;font-size:14px}"
    ".edge{stroke-width:2.5;fill:none;stroke-linecap:round}"
    ".dash{stroke-dasharray:3 6}"
)


def palette(column: int) -> str:
    """Return the rules of one scheme: `.name` fills, `.s-name` strokes."""
    return "".join(
        f".{name}{{fill:{pair[column]}}}.s-{name}{{stroke:{pair[column]}}}"
        for name, pair in COLOURS.items()
    )


class Drawing:
    """A card; shapes are added from back to front."""

    def __init__(self, height: int, title: str, width: int = WIDTH) -> None:
        """Start a card; `title` describes the drawing for screen readers."""
        self.width, self.height, self._title = width, height, title
        self.style = SHAPES
        self._shapes: list[str] = []
        self.box(1, 1, width - 2, height - 2, "paper s-rule", radius=14)

    def add(self, shape: str) -> None:
        """Add raw markup."""
        self._shapes.append(shape)

    def box(
        self, x: float, y: float, w: float, h: float, kind: str, radius: float = 8
    ) -> None:
        """Add a rectangle with round corners."""
        self.add(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}" '
            f'class="{kind}"/>'
        )

    def circle(self, x: float, y: float, r: float, kind: str) -> None:
        """Add a disc."""
        self.add(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" class="{kind}"/>')

    def text(
        self, x: float, y: float, text: str, kind: str = "ink", anchor: str = "middle"
    ) -> None:
        """Add one line of text; `y` is its baseline."""
        self.add(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">'
            f"{escape(text, quote=False)}</text>"
        )

    def lines(self, x: float, y: float, head: str, *texts: str) -> None:
        """Add a bold head with small lines below, left-aligned."""
        self.text(x, y, head, "ink b", "start")
        for at, text in enumerate(texts):
            self.text(x, y + 21 + 19 * at, text, "muted small", "start")

    def path(self, d: str, kind: str = "edge s-line") -> None:
        """Add a line."""
        self.add(f'<path d="{d}" class="{kind}"/>')

    def arrow(self, d: str, tip: tuple[float, float], way: str, name: str) -> None:
        """Add a line with a head at `tip` pointing `way`: up, down, left or right."""
        self.path(d, f"edge s-{name}")
        self.head(tip, way, name)

    def head(self, tip: tuple[float, float], way: str, name: str) -> None:
        """Add the head of an arrow."""
        x, y = tip
        dx, dy = {"up": (0, 9), "down": (0, -9), "left": (9, 0), "right": (-9, 0)}[way]
        wide, high = (6, 0) if dx == 0 else (0, 6)
        left, right = (x + dx + wide, y + dy + high), (x + dx - wide, y + dy - high)
        points = " ".join(f"{px:g},{py:g}" for px, py in ((x, y), left, right))
        self.add(f'<polygon points="{points}" class="{name}"/>')

    def pill(
        self, x: float, y: float, w: float, text: str, kind: str, tone: str = "on"
    ) -> None:
        """Add a coloured label, 30 high."""
        self.box(x, y, w, 30, kind, radius=15)
        self.text(x + w / 2, y + 20.5, text, f"{tone} b")

    def svg(self) -> str:
        """Return the file."""
        dark = f"@media(prefers-color-scheme:dark){{{palette(1)}}}"
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self._title)}">\n'
            f"<style>{self.style}{palette(0)}{dark}</style>\n"
            + "\n".join(self._shapes)
            + "\n</svg>\n"
        )
