"""A document as one HTML file that loads nothing and runs no script.

Every text is escaped; the only markup besides that of the
templates is that of the figures.
"""

import base64

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from samestep.document import plot_style
from samestep.document.blocks import Document, Plot
from samestep.system.terminal import clean


def render(document: Document) -> str:
    """Return the whole page; the same document gives the same text."""
    environment = Environment(
        loader=PackageLoader("samestep.document"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_clean,
    )
    environment.filters["svg"] = _svg
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("page.html.j2").render(
        document=document, colours=plot_style.COLOURS
    )


def _clean(value: object) -> object:
    """Make control characters of foreign text visible; Markup is already escaped."""
    is_foreign = isinstance(value, str) and not isinstance(value, Markup)
    return clean(value) if is_foreign else value


def _svg(plot: Plot) -> Markup:
    return Markup(plot_style.svg(plot.figure, plot.name))  # noqa: S704  matplotlib escapes


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
