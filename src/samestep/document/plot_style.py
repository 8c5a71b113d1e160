"""How figures look, and how they become SVG and PNG.

Colour-blind readers can distinguish the colours. A figure is drawn in those for light
paper; inside a page each becomes a CSS variable, so that it follows the reader's light
or dark scheme. The same data give the same bytes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from samestep.document.formatting import number


INK, MUTED, RULE, CARD = "#1b1f24", "#59616b", "#dde1e6", "#ffffff"
_SERIES = (
    ("#0072b2", "#5fb2ee"),
    ("#d55e00", "#ff8f52"),
    ("#009e73", "#41cca2"),
    ("#b4578f", "#e39ac6"),
    ("#2a86bf", "#a6dafa"),
    ("#b57f00", "#f2c14a"),
)
# Computing is blue, communication orange, waiting red.
_PHASES = {
    "data": ("#8fd0f0", "#b4e0f7"),
    "forward": ("#4a90c8", "#6fb0e8"),
    "backward": ("#205a91", "#3d80c2"),
    "compute": ("#3575ad", "#5698d5"),
    "exchange": ("#eba120", "#f4b640"),
    "wait": ("#c8381c", "#ee6b51"),
    "optimizer": ("#2b9d7d", "#45bf9b"),
    "snapshot": ("#a5569c", "#c984c1"),
    "other": ("#b3b9c0", "#7f8790"),
}
COLOURS = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#a2abb5"),
    "rule": (RULE, "#343b43"),
    "card": (CARD, "#1b1f24"),
    **{f"series-{at}": pair for at, pair in enumerate(_SERIES)},
    **_PHASES,
}
"""CSS variable -> its colour on a light and on a dark page."""
SERIES = tuple(light for light, _ in _SERIES)
PHASES = {name: light for name, (light, _) in _PHASES.items()}

_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
"""Figures are the same bytes on another day and with another matplotlib."""
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.limits": (-4, 6),
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "patch.linewidth": 0,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}
WIDTH, HEIGHT = 4.0, 2.5
"""Inches of a figure; about 11 pixels for its text in a column of a page."""
WIDE = 9.8
DPI = 200


@contextmanager
def style() -> Iterator[None]:
    """Apply this style inside the block, instead of the user's own."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc must not change the report
        mpl.rcParams.update(_STYLE)
        yield


def figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches, with one pair of axes."""
    plot = Figure(figsize=(width, height), layout="constrained")
    return plot, plot.add_subplot()


def legend_below(plot: Figure, axes: Axes) -> None:
    """Put the names of the colours under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = int((plot.get_figwidth() - 0.3) / (0.25 + 0.07 * longest))
    plot.legend(
        handles, labels, loc="outside lower center", ncols=min(4, max(1, columns))
    )


def name_axes(axes: Axes, name: str, below: str, ticks: int = 8) -> None:
    """Name both axes; the lower one counts."""
    axes.set_title(name)
    axes.set_xlabel(below)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(thousands())
    axes.grid(visible=False, axis="x")


def thousands() -> FuncFormatter:
    """Return a formatter that writes `26,000` on an axis."""
    return FuncFormatter(lambda value, _: number(value, ",.6g"))


def svg(plot: Figure, name: str) -> str:
    """Return an element for use inside a page, coloured by CSS variables."""
    # matplotlib's own <style> would hold for the whole page.
    head = re.compile(r'^.*<svg[^>]*(viewBox="[^"]*").*?</style>\s*</defs>', re.DOTALL)
    text = head.sub(r"<svg \1>", svg_file(plot, name))
    # Groups are called alike in all figures; the other ids are salted with `name`.
    text = re.sub(r'<g id="[^"]*"', "<g", text).replace("'DejaVu Sans'", "inherit")
    return re.sub(
        r"#[0-9a-f]{6}", lambda colour: _VARIABLES.get(colour[0], colour[0]), text
    )


def svg_file(plot: Figure, name: str) -> str:
    """Return the content of an SVG file, in the colours for light paper."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        plot.savefig(file, format="svg", metadata=_NO_METADATA)
    return file.getvalue()


def png(plot: Figure) -> bytes:
    """Return a PNG on white, for documents that cannot show SVG."""
    file = io.BytesIO()
    plot.savefig(
        file, format="png", dpi=DPI, facecolor=CARD, metadata={"Software": None}
    )
    return file.getvalue()
