"""How figures look, and how they become SVG and PNG.

Colours can be told apart by colour-blind readers. A figure is drawn in the colours for
a light page; inside a page each becomes a CSS variable, so that it follows the reader's
light or dark scheme. Figures are the same bytes for the same data.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure


INK, MUTED, RULE, CARD = "#1b1f24", "#59616b", "#dde1e6", "#ffffff"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b4578f", "#2a86bf", "#b57f00")
PHASES = {
    "data": "#8fd0f0",
    "forward": "#4a90c8",
    "backward": "#205a91",
    "exchange": "#eba120",
    "wait": "#c8381c",
    "optimizer": "#2b9d7d",
    "snapshot": "#a5569c",
    "other": "#b3b9c0",
}
"""Computing is blue, talking orange, waiting red."""

COLOURS = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#a2abb5"),
    "rule": (RULE, "#343b43"),
    "card": (CARD, "#1b1f24"),
    "series-0": (SERIES[0], "#5fb2ee"),
    "series-1": (SERIES[1], "#ff8f52"),
    "series-2": (SERIES[2], "#41cca2"),
    "series-3": (SERIES[3], "#e39ac6"),
    "series-4": (SERIES[4], "#a6dafa"),
    "series-5": (SERIES[5], "#f2c14a"),
    "data": (PHASES["data"], "#b4e0f7"),
    "forward": (PHASES["forward"], "#6fb0e8"),
    "backward": (PHASES["backward"], "#3d80c2"),
    "exchange": (PHASES["exchange"], "#f4b640"),
    "wait": (PHASES["wait"], "#ee6b51"),
    "optimizer": (PHASES["optimizer"], "#45bf9b"),
    "snapshot": (PHASES["snapshot"], "#c984c1"),
    "other": (PHASES["other"], "#7f8790"),
}
"""CSS variable -> its colour on a light and on a dark page."""

_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.formatter.limits": (-4, 6),
    "axes.formatter.use_mathtext": False,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "path.simplify": True,
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
    """Figures are made and written in this style, whatever the user's own is."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def figure(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes; inches."""
    made = Figure(figsize=(width, height))
    return made, made.add_subplot()


def legend_below(plot: Figure, axes: Axes) -> None:
    """Names for the colours, under the figure."""
    handles, labels = axes.get_legend_handles_labels()
    columns = _columns(plot, labels)
    plot.legend(handles, labels, loc="lower center", ncols=columns)


def label(text: str) -> str:
    """A foreign word for a legend: short, and of letters that every font has."""
    return re.sub(r"[^ -~]", "?", text)[:24]


def svg(plot: Figure, name: str) -> str:
    """For use inside a page: coloured by CSS variables, ids prefixed with `name`."""
    text = svg_file(plot, name)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version|width|height)="[^"]*"', "", text, count=5)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace("'DejaVu Sans'", "inherit")
    return re.sub(r"#[0-9a-f]{6}", _variable, text)


def svg_file(plot: Figure, name: str) -> str:
    """A file of its own, in the colours for light paper."""
    _make_room(plot)
    with mpl.rc_context({"svg.hashsalt": name}):
        file = io.StringIO()
        plot.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def png(plot: Figure) -> bytes:
    """On white, for documents that cannot show SVG."""
    _make_room(plot)
    file = io.BytesIO()
    plot.savefig(
        file, format="png", dpi=DPI, facecolor=CARD, metadata={"Software": None}
    )
    return file.getvalue()


LETTER, LINE = 0.078, 0.17
"""Inches: about the width of a letter, and the height of a line of a legend."""


def _make_room(plot: Figure) -> None:
    """Margins for the labels; matplotlib's own layout takes as long as drawing."""
    axes = plot.axes[0]
    width, height = plot.get_size_inches()
    longest = max((len(t.get_text()) for t in axes.yaxis.get_ticklabels()), default=0)
    left = 0.14 + LETTER * longest + (0.2 if axes.get_ylabel() else 0)
    labels = [text.get_text() for made in plot.legends for text in made.get_texts()]
    lines = math.ceil(len(labels) / _columns(plot, labels))
    bottom = 0.5 + (0.1 + LINE * lines if lines else 0)
    plot.subplots_adjust(
        left=left / width,
        right=1 - 0.16 / width,
        bottom=bottom / height,
        top=1 - (0.3 if axes.get_title() or axes.get_title("left") else 0.1) / height,
    )


def _columns(plot: Figure, labels: Sequence[str]) -> int:
    """Of a legend that is no wider than its figure."""
    longest = max(map(len, labels), default=0)
    width, _ = plot.get_size_inches()
    return min(4, max(1, int((width - 0.3) / (0.25 + 0.07 * longest))))


def _variable(colour: re.Match[str]) -> str:
    return _VARIABLES.get(colour[0], colour[0])
