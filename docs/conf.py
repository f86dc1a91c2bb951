"""Settings of the documentation site, which `make docs` builds: pages in docs/, notebooks with their stored
outputs, the API reference.

The sources are the whole checkout, so that links between README, docs/ and notebooks/ work on the site as
they do in the repository. Nothing is fetched, neither while the site is built nor when it is read.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from site_docstrings import read_docstring  # noqa: E402
from site_math import add_math  # noqa: E402
from site_pages import write_pages  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

import plain_diffusion  # noqa: E402

project = "Plain Diffusion"
author = copyright = "The Plain Diffusion authors"
version = release = plain_diffusion.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*.ipynb", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "runs", "samples", "outputs", "tests", "**/__pycache__"]
templates_path = ["templates"]
language = "en"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are those that the notebooks are committed with
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # by default scripts from elsewhere

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
autodoc_inherit_docstrings = False  # what torch says of forward
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "Plain Diffusion"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_additional_pages = {"index": "first.html"}
html_show_sourcelink = False


def setup(app: Sphinx) -> None:
    add_math(app)
    app.connect("builder-inited", lambda app: write_pages(HERE / "generated"))
    app.connect("autodoc-process-docstring", read_docstring)
