"""Sphinx settings. `make docs` builds the site into `build/docs`; warnings are errors."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from generated import write_pages  # noqa: E402

import growfx  # noqa: E402

project, author = "growfx", "The growfx developers"
copyright = "The growfx developers, Apache-2.0"  # noqa: A001
version = release = growfx.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["templates"]
html_theme = "furo"
html_title = f"growfx {release}"
html_copy_source = False
html_static_path, html_css_files = ["static"], ["site.css"]
pygments_dark_style = "github-dark"  # furo's own underlines the names of modules, like links
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Docstrings set code in single backticks, and give types in their signatures.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_use_rtype = False
nitpicky = False


def setup(app):
    """Write the pages that are made of code and of measurements before any page is read."""
    write_pages(DOCS)
