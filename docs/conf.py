"""Builds these pages and the API reference: python -m sphinx -W docs build/docs."""

import rrattn

project = "rrattn"
author = copyright = "the rrattn authors"
version = release = rrattn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
napoleon_google_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give dtypes and shapes as well
myst_heading_anchors = 3
html_title = "rrattn"
html_theme = "alabaster"
html_theme_options = {"description": rrattn.__doc__.splitlines()[0], "page_width": "1100px"}
