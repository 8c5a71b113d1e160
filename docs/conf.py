"""How Sphinx builds the documents: `make docs`. Nothing is fetched from a network."""

import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


sys.path.insert(0, str(Path(__file__).parent))  # fields.py, mathml.py

project = "samestep"
copyright = "the samestep authors"  # noqa: A001  Sphinx wants this name
version = release = installed("samestep")
extensions = [
    "fields",
    "mathml",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "sphinx_copybutton",
]
exclude_patterns = ["**/__pycache__"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings are plain text with names in single backticks.
default_role = "literal"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"samestep {version}"
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"
html_show_sphinx = False
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def _without_module_docstrings(_app: Sphinx, what: str, *rest: Any) -> None:
    """Drop the docstrings of modules; the pages introduce them."""
    if what == "module":
        rest[-1].clear()


def _examples_as_code(_app: Sphinx, _context: Any, lines: list[str]) -> None:
    """Show the examples in a command's help as code blocks, not as line blocks."""
    shown = []
    for line in lines:
        verse = line.removeprefix("| ")
        if verse == line:
            shown.append(line)
        elif verse.endswith(":"):
            shown += [verse, "", ".. code-block:: text", ""]
        else:
            shown.append(f"   {verse}")
    lines[:] = shown


def setup(app: Sphinx) -> None:
    """Register the hooks; Sphinx calls this."""
    app.connect("autodoc-process-docstring", _without_module_docstrings)
    app.connect("sphinx-click-process-description", _examples_as_code)
