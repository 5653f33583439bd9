"""How Sphinx builds the site. `tox run -e docs` does it, with every warning an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).with_name("_extensions")))

project = "pytest-vmsandbox"
copyright = "the authors of pytest-vmsandbox"  # noqa: A001  # Sphinx's name
release = version = version_of(project)

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_click",
    "reference",  # ours: what no other extension generates from the code
]
nitpicky = True
nitpick_ignore_regex = [
    # A word in single backquotes links to what has that name; most words name nothing.
    ("py:obj", r".*"),
]

# Pages are Markdown, and links such as `files.md#what-comes-back` are those of GitHub.
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"  # of a block that names no language

# Docstrings are in Google's style.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures as short as those of `subprocess`; the text has the types
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True  # an attribute is described once, in its class
python_maximum_signature_line_length = 120

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
