"""Formulas as MathML, which browsers show without a script and without a network."""

from typing import Any, cast

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata
from sphinx.writers.html5 import HTML5Translator


def _inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def _block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(
        f"<div class='math'>{_mathml(node.astext(), as_block=True)}</div>"
    )
    raise nodes.SkipNode


def _mathml(formula: str, as_block: bool) -> str:
    """Return a LaTeX formula as MathML."""
    parsed: Any = latex2mathml.tex2mathml(formula, as_block=as_block)
    return cast(str, parsed)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the writer; Sphinx calls this."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True}
